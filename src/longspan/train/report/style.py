"""The report's style sheet and its one small script, as text: nothing on the page comes from elsewhere.

The script only shows values under the pointer; everything it shows is in the tables too.
"""

from __future__ import annotations

from longspan.train.markup import Raw

RANK_COLOURS = {
    "light": ("#2f6fd0", "#d9731a", "#15927a", "#bd4a99", "#a8860b", "#3399c9", "#c9453a", "#7357c4"),
    "dark": ("#6ea3f7", "#f19a4c", "#3fc4a5", "#e57fc4", "#d9b640", "#6cc3ee", "#f07f74", "#a791f0"),
}


def _colours(theme: str) -> str:
    return "".join(f"--r{index}:{colour};" for index, colour in enumerate(RANK_COLOURS[theme]))


_LIGHT = "--page:#fbfbfa;--card:#fff;--ink:#1d2129;--soft:#5b6472;--rule:#e2e4e8;--track:#f1f2f4;--warn:#b3261e;"
_DARK = "--page:#14161a;--card:#1b1e24;--ink:#e8eaee;--soft:#a2abb8;--rule:#31363f;--track:#262a32;--warn:#ff8a80;"

CSS = Raw(
    f":root{{color-scheme:light dark;{_LIGHT}{_colours('light')}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}{_colours('dark')}}}}}"
    + "".join(f".r{i}{{--c:var(--r{i})}}.s{i}{{--c:var(--r{i})}}" for i in range(8))
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",Roboto,"DejaVu Sans",
  sans-serif}
main{max-width:960px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 4px}h3{font-size:.95rem;margin:20px 0 6px}
p{margin:6px 0 12px;max-width:86ch}.lead,.caption{color:var(--soft)}.caption{font-size:.9rem;max-width:96ch}
.warn{color:var(--warn);font-weight:600}
nav{margin:18px 0 0;font-size:.9rem;display:flex;flex-wrap:wrap;gap:4px 16px}
a{color:var(--r0)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--r0);outline-offset:2px}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px 22px;margin:20px 0 0}
figure{margin:12px 0 4px;position:relative}
figure svg{display:block;max-width:100%;height:auto;overflow:visible}
.narrow{display:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:8px 0 0;padding:0;font-size:.85rem;
  color:var(--soft)}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;background:var(--c);margin-right:6px;
  vertical-align:-1px}
.legend .dot i{border-radius:50%}
.bars{display:grid;gap:8px 28px;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));margin:14px 0}
.bars h3{margin:0 0 8px}.bars h3 b{font-size:2rem;font-weight:650;letter-spacing:-.02em;margin-right:6px}
.bars h3 span{font-weight:400;color:var(--soft)}
.bar{display:grid;grid-template-columns:4.2rem 1fr 3.6rem;align-items:center;gap:8px;font-size:.9rem;margin:4px 0}
.bar>span:last-child{text-align:right;font-variant-numeric:tabular-nums}
.bar div{background:var(--track);border-radius:3px;height:14px}
.bar div i{display:block;height:14px;border-radius:3px;background:var(--soft);opacity:.55}
.bar.model{font-weight:650}.bar.model div i{background:var(--r0);opacity:1}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:8px 0}
caption{text-align:left;color:var(--soft);padding-bottom:4px}
th,td{text-align:right;padding:4px 0 4px 20px;border-bottom:1px solid var(--rule);white-space:nowrap;
  font-weight:400}
thead th{color:var(--soft);border-bottom-width:2px}th:first-child,td:first-child{padding-left:0;text-align:left}
td.text,th.text{text-align:left}td.long{white-space:normal;overflow-wrap:anywhere;min-width:14rem}
.scroll{overflow-x:auto;max-width:100%}.tall{max-height:26rem;overflow-y:auto}
details{margin:10px 0 0}summary{cursor:pointer;color:var(--soft);font-size:.9rem}
pre{background:var(--track);border-radius:6px;padding:12px 14px;margin:10px 0 4px;font:13px/1.5 ui-monospace,
  "DejaVu Sans Mono",Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
pre .prompt{color:var(--soft)}pre b{font-weight:650}
.gantt{display:flex;align-items:flex-start}.gantt svg{max-width:none;flex:none}
.gantt .scroll{flex:1;min-width:0}
.pairs{display:grid;grid-template-columns:max-content 1fr;gap:2px 20px;font-size:.9rem;margin:8px 0}
.pairs dt{color:var(--soft)}.pairs dd{margin:0;overflow-wrap:anywhere}
footer{color:var(--soft);font-size:.85rem;margin-top:24px}
svg text{font:12px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--ink);
  font-variant-numeric:tabular-nums}
svg .small,svg .owner{font-size:11px}svg .soft{fill:var(--soft)}svg .strong{font-weight:650}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.track{fill:var(--track)}
.change{stroke:var(--soft);stroke-opacity:.45;stroke-dasharray:2 3}.span{fill:var(--soft)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;stroke-opacity:.4}
.dots circle{fill:var(--card);stroke:var(--c);stroke-width:2}.lost{fill:none;stroke:var(--warn);stroke-width:2}
.held{fill:var(--c);fill-opacity:.8;stroke:var(--card);stroke-width:.6}.sparse{fill-opacity:.18}
.hatch{stroke:var(--c);stroke-width:1.6;fill:none}.thick{stroke-width:3}
svg .owner{fill:#14161a;font-weight:650}
.box{stroke:var(--c);fill:var(--card);fill:color-mix(in srgb,var(--c) 27%,var(--card))}
.send .box{fill:color-mix(in srgb,var(--c) 8%,var(--card));stroke-dasharray:3 2}
.arrow{fill:none;stroke:var(--c);stroke-width:1.4}.head{fill:var(--c)}.far{opacity:.5}
.cursor{stroke:var(--soft)}
.tip{position:absolute;top:-4px;right:0;background:var(--card);border:1px solid var(--rule);border-radius:5px;
  padding:1px 8px;font-size:.82rem;pointer-events:none;font-variant-numeric:tabular-nums}
@media (max-width:700px){
  main{padding:20px 10px 40px}
  section{padding:14px 12px;border-radius:8px}
  .wide{display:none}
  .narrow{display:block}
  h1{font-size:1.4rem}
  .pairs{grid-template-columns:1fr;gap:0}
  .pairs dd{margin-bottom:8px}
  th,td{padding-left:14px}
}
@media print{:root{color-scheme:light;"""
    + _LIGHT
    + _colours("light")
    + """}
  body{background:#fff;font-size:12px}main{max-width:none;padding:0}
  section{border:0;padding:12px 0;break-inside:avoid-page}nav,.tip{display:none}
  .gantt>svg,.gantt .scroll{flex:var(--w) 1 0;min-width:0;height:auto}
  .gantt .scroll svg{width:100%;height:auto}
  .scroll,.tall{overflow:visible;max-height:none}
}
"""
)

SCRIPT = Raw(
    """
document.querySelectorAll('svg[data-hover]').forEach(function (svg) {
  var data = JSON.parse(svg.dataset.hover), box = svg.viewBox.baseVal, tip = document.createElement('div');
  var line = document.createElementNS(svg.namespaceURI, 'line');
  tip.className = 'tip'; tip.hidden = true; line.setAttribute('class', 'cursor');
  svg.parentNode.append(tip);
  svg.addEventListener('pointermove', function (event) {
    var frame = svg.getBoundingClientRect(), x = (event.clientX - frame.left) / frame.width * box.width;
    var best = data.rows.reduce(function (a, b) { return Math.abs(a[0] - x) > Math.abs(b[0] - x) ? b : a; });
    line.setAttribute('x1', best[0]); line.setAttribute('x2', best[0]);
    line.setAttribute('y1', data.top); line.setAttribute('y2', data.bottom);
    svg.append(line); tip.textContent = best[1]; tip.hidden = false;
  });
  svg.addEventListener('pointerleave', function () { line.remove(); tip.hidden = true; });
});
"""
)
