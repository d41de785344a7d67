"use strict";
// Says of each table that is wider than its place that it can be scrolled sideways.
const tables = document.querySelectorAll(".scroll");
const look = () => { for (const t of tables) t.classList.toggle("overflows", t.scrollWidth > t.clientWidth + 2); };
addEventListener("resize", look);
look();
