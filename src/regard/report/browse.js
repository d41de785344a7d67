"use strict";
// The gallery of all images: filters, pages, and one image at its own resolution with its maps.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const uri = code => "data:image/" + code;
const PAGE = 48;
let shown = [], page = 0, open = -1, layer = 0, zoom = 0;

const item = k => {
  const [name, truth, top, thumb] = data.listed[k];
  return { k, name, truth, top, thumb, said: top[0][0], p: top[0][1], right: top[0][0] === truth };
};
const percent = p => {
  if (p > .999 && p < 1) return "> 99.9\u00a0%";
  if (p > 0 && p < .001) return "< 0.1\u00a0%";
  return (100 * p).toFixed(1) + "\u00a0%";
};
const make = (tag, text = "", name = "") => {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (name) made.className = name;
  return made;
};

// ---- the list ---------------------------------------------------------------------------
function filtered() {
  const verdict = $("f-verdict").value, truth = $("f-true").value, said = $("f-said").value;
  const words = $("f-name").value.toLowerCase(), mapped = $("f-maps").checked;
  const found = data.listed.map((_, k) => item(k)).filter(x =>
    (verdict === "" || x.right === (verdict === "right")) && (truth === "" || x.truth === +truth) &&
    (said === "" || x.said === +said) && (!words || x.name.toLowerCase().includes(words)) &&
    (!mapped || x.k in data.details));
  const order = $("f-order").value;
  if (order === "sure") found.sort((a, b) => b.p - a.p || a.k - b.k);
  if (order === "unsure") found.sort((a, b) => a.p - b.p || a.k - b.k);
  if (order === "name") found.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return found.map(x => x.k);
}

function refill(first = 0) {
  shown = filtered();
  page = Math.max(0, Math.min(first, Math.ceil(shown.length / PAGE) - 1));
  draw();
}

function draw() {
  const from = page * PAGE, part = shown.slice(from, from + PAGE);
  $("tiles").replaceChildren(...part.map(tile));
  $("count").textContent = shown.length ? `${from + 1}–${from + part.length} of ${shown.length.toLocaleString("en")} ${shown.length === 1 ? "image" : "images"}` : "No image fits these filters.";
  $("back").disabled = page === 0;
  $("forth").disabled = from + PAGE >= shown.length;
}

function tile(k) {
  const x = item(k), li = make("li"), button = make("button", "", "tile " + (x.right ? "right" : "wrong"));
  button.type = "button";
  if (x.thumb >= 0) {
    const image = make("img");
    image.src = uri(data.thumbs[x.thumb]); image.alt = "";
    if (data.thumbs[x.thumb].startsWith("png")) image.className = "pixels";
    button.append(image);
  } else button.append(make("span", "no picture", "none"));
  const answer = make("span", "", "answer");
  answer.append(make("b", (x.right ? "✓ " : "✗ ") + data.classes[x.said]), " " + percent(x.p) + (k in data.details ? " ◉" : ""));
  button.append(answer);
  if (!x.right) button.append(make("span", "is " + data.classes[x.truth], "is"));
  const file = x.name.split("/").pop();
  button.append(make("span", file.length > 18 ? "…" + file.slice(-17) : file, "file"));
  button.title = x.name;
  button.addEventListener("click", () => view(k));
  li.append(button);
  return li;
}

// ---- one image --------------------------------------------------------------------------
const pictures = {};
function load(code) {
  pictures[code] ??= new Promise(done => { const i = new Image(); i.onload = () => done(i); i.src = uri(code); });
  return pictures[code];
}

async function view(k) {
  open = k;
  const x = item(k), detail = data.details[k];
  $("v-name").textContent = x.name;
  $("v-verdict").textContent = x.right ? "✓ right" : "✗ wrong";
  $("v-verdict").className = "verdict" + (x.right ? "" : " bad");
  $("v-truth").textContent = "true class " + data.classes[x.truth];
  $("v-classes").replaceChildren(...x.top.map(([c, p]) => {
    const li = make("li"), bar = make("i");
    bar.style.width = 100 * p + "%";
    li.append(make("span", data.classes[c]), make("span", percent(p)), bar);
    return li;
  }));
  const layers = ["image", ...(detail ? detail.maps.map(m => m.kind === "gradcam" ? "Grad-CAM: " + detail.target : m.name) : [])];
  if (layer >= layers.length) layer = 0;
  $("v-layers").replaceChildren(...layers.map((name, i) => {
    const button = make("button", name);
    button.type = "button";
    button.setAttribute("aria-pressed", i === layer);
    button.addEventListener("click", () => { layer = i; view(k); });
    return button;
  }));
  $("v-masked").hidden = !(detail && detail.mask);
  $("v-how").hidden = !!detail;
  $("v-command").textContent = "regard explain " + quoted(data.run) + " " + quoted(x.name.startsWith("/") ? x.name : "…/" + x.name);
  if (!$("viewer").open) $("viewer").showModal();
  await paint(x, detail);
}

const quoted = text => /^[\w./:…-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\\''") + "'";

async function paint(x, detail) {
  const canvas = $("v-canvas");
  const code = detail ? detail.image : x.thumb >= 0 ? data.thumbs[x.thumb] : null;
  canvas.hidden = !code;
  if (!code) { $("v-range").textContent = "No picture of this image is in this file."; return; }
  const image = await load(code), mask = detail && detail.mask && $("v-mask").checked ? await load(detail.mask) : null;
  if (open !== x.k) return;
  const times = Math.max(1, Math.floor(900 / Math.max(image.naturalWidth, image.naturalHeight)));
  const w = image.naturalWidth * times, h = image.naturalHeight * times;
  canvas.width = w; canvas.height = h;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, w, h);
  const map = detail && layer > 0 ? detail.maps[layer - 1] : null;
  if (map) color(context, w, h, map, detail.box);
  if (mask) outline(context, w, h, mask);
  const own = detail ? `${detail.size[0]} × ${detail.size[1]} pixels` : "thumbnail";
  const stored = detail && detail.size[0] !== image.naturalWidth ? `, stored at ${image.naturalWidth} × ${image.naturalHeight}` : "";
  $("v-range").textContent = map ? `${map.cells}; ${map.kind === "gradcam" ? map.range.replace("attention ", "") : map.range}` : own + stored;
  canvas.classList.toggle("pixels", times > 1);
  canvas.style.width = zoom ? image.naturalWidth * zoom + "px" : "";
  canvas.setAttribute("aria-label", (map ? "Map " + map.name + " over " : "") + x.name);
}

// out = (1 - w) gray + w viridis(0.3 + 0.7 s), w = 0.75 s, as regard.explanations.overlay
const VIRIDIS = document.getElementById("viridis").textContent.trim().split(" ").map(c => [0, 2, 4].map(i => parseInt(c.slice(i, i + 2), 16)));
function color(context, w, h, map, box) {
  const pixels = context.getImageData(0, 0, w, h), d = pixels.data, [mh, mw] = map.size;
  const values = Uint8Array.from(atob(map.values), c => c.charCodeAt(0));
  const [left, top, right, bottom] = [Math.round(box[0] * w), Math.round(box[1] * h), Math.round(box[2] * w), Math.round(box[3] * h)];
  const at = (r, c) => values[Math.min(mh - 1, Math.max(0, r)) * mw + Math.min(mw - 1, Math.max(0, c))];
  for (let y = 0; y < h; y++) {
    const v = (y + .5 - top) / (bottom - top) * mh - .5, r = Math.floor(v), fy = v - r;
    for (let x = 0; x < w; x++) {
      const o = 4 * (y * w + x), gray = .1 + .7 * (.299 * d[o] + .587 * d[o + 1] + .114 * d[o + 2]) / 255;
      if (x < left || x >= right || y < top || y >= bottom) {
        d[o] = d[o + 1] = d[o + 2] = 255 * (gray + .5 * (1 - gray));
        continue;
      }
      const u = (x + .5 - left) / (right - left) * mw - .5, c = Math.floor(u), fx = u - c;
      const s = (map.few ? at(Math.floor(v + .5), Math.floor(u + .5))
        : (1 - fy) * ((1 - fx) * at(r, c) + fx * at(r, c + 1)) + fy * ((1 - fx) * at(r + 1, c) + fx * at(r + 1, c + 1))) / 255;
      const tint = VIRIDIS[Math.round(s * (VIRIDIS.length - 1))], weight = .75 * s;
      for (let i = 0; i < 3; i++) d[o + i] = (1 - weight) * 255 * gray + weight * tint[i];
    }
  }
  context.putImageData(pixels, 0, 0);
}

function outline(context, w, h, mask) {
  const canvas = document.createElement("canvas");
  canvas.width = w; canvas.height = h;
  const other = canvas.getContext("2d");
  other.imageSmoothingEnabled = false;
  other.drawImage(mask, 0, 0, w, h);
  const inside = other.getImageData(0, 0, w, h).data, pixels = context.getImageData(0, 0, w, h), d = pixels.data;
  const marked = (x, y) => x >= 0 && y >= 0 && x < w && y < h && inside[4 * (y * w + x)] > 127;
  const wide = Math.max(1, Math.round(Math.max(w, h) / 500));
  for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
    const here = marked(x, y);
    const edge = marked(x - wide, y) !== here || marked(x + wide, y) !== here || marked(x, y - wide) !== here || marked(x, y + wide) !== here;
    if (edge) { const o = 4 * (y * w + x); d[o] = d[o + 1] = d[o + 2] = here ? 255 : 0; }
  }
  context.putImageData(pixels, 0, 0);
}

function step(by) {
  const list = shown.includes(open) ? shown : data.listed.map((_, k) => k), next = list.indexOf(open) + by;
  if (next >= 0 && next < list.length) view(list[next]);
}

// ---- the page ---------------------------------------------------------------------------
for (const [id, seen] of [["f-true", x => x.truth], ["f-said", x => x.said]]) {
  const present = new Set(data.listed.map((_, k) => seen(item(k))));
  $(id).append(...data.classes.map((name, c) => [name, c]).filter(([, c]) => present.has(c)).map(([name, c]) => new Option(name, c)));
}
for (const id of ["f-verdict", "f-true", "f-said", "f-order", "f-maps"]) $(id).addEventListener("change", () => refill());
$("f-name").addEventListener("input", () => refill());
$("f-clear").addEventListener("click", () => { $("filters").reset(); refill(); });
$("filters").addEventListener("submit", event => event.preventDefault());
$("back").addEventListener("click", () => { page--; draw(); });
$("forth").addEventListener("click", () => { page++; draw(); });
$("v-close").addEventListener("click", () => $("viewer").close());
$("v-back").addEventListener("click", () => step(-1));
$("v-forth").addEventListener("click", () => step(1));
$("v-mask").addEventListener("change", () => view(open));
$("v-zoom").addEventListener("change", event => { zoom = +event.target.value; view(open); });
$("viewer").addEventListener("click", event => { if (event.target === $("viewer")) $("viewer").close(); });
document.addEventListener("keydown", event => {
  if (!$("viewer").open || event.target.tagName === "SELECT") return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
for (const card of document.querySelectorAll("[data-open]")) {
  const k = +card.dataset.open;
  if (!(k in data.details)) continue;
  card.hidden = false;
  card.addEventListener("click", () => { layer = 0; view(k); });
}
$("browse").hidden = false;
for (const link of document.querySelectorAll("[data-browse]")) link.hidden = false;
refill();
