"""Studies: networks compared over seeds and folds, with the run of each as an ordinary folder."""
