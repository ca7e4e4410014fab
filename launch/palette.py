"""The colours of every picture of a run: of `copus report`, of the live page, and of what matplotlib draws.

Those of layouts and runs are Okabe and Ito's, which people with any colour vision tell apart.
"""

LIGHT = {
    "page": "#fdfdfc",
    "card": "#f4f5f6",
    "ink": "#1d2429",
    "muted": "#5f6b76",
    "grid": "#e2e6e9",
    "faint": "#bfc8d0",
    "accent": "#2f6f9f",
    "noise": "#7b5aa6",
    "good": "#00795a",
    "bad": "#b3261e",
    "c0": "#0072b2",
    "c1": "#e69f00",
    "c2": "#009e73",
    "c3": "#cc79a7",
    "c4": "#56b4e9",
    "c5": "#d55e00",
    "c6": "#8c6d1f",
    "c7": "#6b7280",
}
"""Name → colour on a light page; pages have them as CSS variables, `var(--ink)`."""
DARK = {
    "page": "#14181c",
    "card": "#1c2228",
    "ink": "#e6eaed",
    "muted": "#9aa6b1",
    "grid": "#2c343c",
    "faint": "#5a6672",
    "accent": "#6cb2e4",
    "noise": "#ab8fd6",
    "good": "#3fc79c",
    "bad": "#f2857d",
    "c0": "#4da3db",
    "c1": "#f0b23e",
    "c2": "#2fbf97",
    "c3": "#de9bc0",
    "c4": "#8ccbf0",
    "c5": "#f0803c",
    "c6": "#c2a25a",
    "c7": "#9aa3ae",
}
"""The same on a dark page."""
LAYOUTS = tuple(LIGHT[f"c{place}"] for place in range(8))
"""One colour for each layout, in the order in which the run came to them."""
