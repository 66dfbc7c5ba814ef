"""The page's style sheet: two colour schemes, one layout that folds for a phone."""

from __future__ import annotations

_LIGHT = {
    "page": "#f5f5f2",
    "card": "#ffffff",
    "ink": "#1c2127",
    "muted": "#59636e",
    "line": "#dcdfe2",
    "shade": "#00000026",
    "on": "#ffffff",  # text on a bar
    "accent": "#3a4cc0",
    "accent-back": "#eaecfb",
    "good": "#176b3c",
    "good-back": "#e3f3e8",
    "bad": "#b3261e",
    "bad-back": "#fbe8e6",
    "unsure": "#8a5a00",
    "unsure-back": "#fcf0d4",
    "base": "#5b6b7c",
    "candidate": "#4456c7",
}
_DARK = {
    "page": "#14171b",
    "card": "#1d2126",
    "ink": "#e7eaed",
    "muted": "#a3adb8",
    "line": "#383f47",
    "shade": "#00000080",
    "on": "#14171b",
    "accent": "#9aa8ff",
    "accent-back": "#272d4d",
    "good": "#7fd6a0",
    "good-back": "#17301f",
    "bad": "#ff8f84",
    "bad-back": "#431d1a",
    "unsure": "#f0b955",
    "unsure-back": "#3a2d10",
    "base": "#9fb0c3",
    "candidate": "#8c9bff",
}

# At least 3:1 against the card, so that lines are seen; the order is that of TENSOR_CLASSES and of PARTS.
_CLASSES_LIGHT = "4456c7 00806f b5690a c2356b 0b7fab 6b7a12 8a3fb0 8a5a3c 5b6b7c 2e8540 b3362a 6f6f6f"
_CLASSES_DARK = "8c9bff 3fc7b2 f0b04d ff7fa8 5cc3ee b9c94a c58cf0 cfa27f 9fb0c3 6fcf7f ff8a7a b0b0b0"
_PARTS_LIGHT, _PARTS_DARK = (
    "50657d 00806f 4456c7 b5690a c2356b 7a7267",
    "8fa6c0 3fc7b2 8c9bff f0b04d ff7fa8 b5ab9c",
)


def style_sheet() -> str:
    """Return the CSS of the page."""
    light, dark = _rule(_LIGHT, _CLASSES_LIGHT, _PARTS_LIGHT), _rule(_DARK, _CLASSES_DARK, _PARTS_DARK)
    return f"\n{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n{_LAYOUT}"


def _rule(named: dict[str, str], classes: str, parts: str) -> str:
    variables = {**named}
    for prefix, colours in (("class", classes), ("part", parts)):
        variables |= {f"{prefix}-{number}": f"#{colour}" for number, colour in enumerate(colours.split())}
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in variables.items()) + "}"


_LAYOUT = """\
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:44px}
h1{font-size:clamp(1.7rem,1.2rem + 2.2vw,2.6rem);line-height:1.15;margin:0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;margin:0 0 4px}
p{margin:0 0 12px}
.eyebrow{color:var(--accent);font-weight:600;font-size:.85rem;letter-spacing:.04em;margin-bottom:8px}
.lead{font-size:1.1rem;max-width:52em;margin:14px 0}
.meta{color:var(--muted);font-size:.92rem}
.note,summary{color:var(--muted);font-size:.92rem}
.badge{display:inline-block;padding:1px 11px;margin-right:6px;border-radius:99px;font-weight:600;font-size:.85rem;
color:var(--accent);background:var(--accent-back)}
.badge.good{color:var(--good);background:var(--good-back)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:24px 28px;margin:20px 0}
p.card.good{font-size:1.1rem;color:var(--good);background:var(--good-back);border-color:transparent}
.tiles{list-style:none;display:flex;flex-wrap:wrap;gap:1px;padding:0;margin:28px 0 20px;background:var(--line);
border:1px solid var(--line);border-radius:12px;overflow:hidden}
.tiles li{flex:1 1 150px;background:var(--card);padding:18px 20px;min-width:0}
.tiles li:first-child{flex:1.3 0 auto}
.tiles span,.tiles small{display:block;color:var(--muted);font-size:.88rem;line-height:1.4;overflow-wrap:anywhere}
.tiles strong{display:block;font-size:1.4rem;line-height:1.25;margin:4px 0 6px;white-space:nowrap;letter-spacing:-.01em}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em;overflow-wrap:anywhere}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:10px 14px;margin:0 0 16px;
white-space:pre-wrap}
section.card>:last-child{margin-bottom:0}
svg{display:block;width:100%;height:auto;stroke-linejoin:round}
svg.narrow{display:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:8px 0 6px;padding:0;font-size:.92rem}
/* The shade at an edge says that there is more that way: what scrolls covers it when there is none. */
.scroll{overflow-x:auto;margin-top:8px;background:linear-gradient(to right,var(--card) 40%,transparent) local,
linear-gradient(to left,var(--card) 40%,transparent) right local,
linear-gradient(to right,var(--shade),transparent),linear-gradient(to left,var(--shade),transparent) right;
background-repeat:no-repeat;background-size:40px 100%,40px 100%,14px 100%,14px 100%}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
table.compact{width:auto}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);font-weight:400}
thead th{color:var(--muted);font-weight:600;font-size:.85rem}
tbody tr:last-child>*{border-bottom:0}
th:first-child,.words :is(th,td):nth-child(2),.reasons :is(th,td):last-child{text-align:left}
.reasons td:last-child{white-space:normal;min-width:15em}
th:first-child{padding-left:0}
:is(th,td):last-child{padding-right:4px}
td wbr{display:none}
details{margin-top:12px}
summary{cursor:pointer;width:fit-content}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 24px;margin:8px 0 16px}
dl div{display:contents}
dt{color:var(--muted)}
dd{margin:0;min-width:0;overflow-wrap:anywhere}
dl+details{margin:0 0 20px}
figure{margin:20px 0}
@media (min-width:861px){th wbr{display:none}}
@media (max-width:860px){
header,main{padding-left:16px;padding-right:16px}
header{padding-top:28px}
.card{padding:18px 16px}
svg.wide{display:none}
svg.narrow{display:block;max-width:560px}
.tiles li{flex-basis:40%}
.tiles li:first-child{flex-basis:100%}
th,td{padding:7px 9px}
th:has(code){white-space:normal;min-width:185px}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:10px}
}
@media print{body{background:none}.card,.tiles{break-inside:avoid}}
"""
