"""How a report looks: light and dark, wide and narrow, on screen and on paper."""

from __future__ import annotations

from typing import Final

_LIGHT = ("#eef4fb", "#d3e4f4", "#aed0ea", "#7fb6dc", "#5199cb", "#2b7bb8", "#12599a", "#08306b")
_DARK = ("#12243a", "#173554", "#1c4873", "#225e94", "#3a7cb8", "#629fd3", "#97c4e8", "#d6eafb")


def _ramp(colours: tuple[str, ...]) -> str:
    return "".join(f"--h{i}:{colour};" for i, colour in enumerate(colours))


_CLASSES = "".join(
    f".h{i}{{stroke:var(--h{i});background:var(--h{i})}}" for i in range(len(_LIGHT))
)

STYLE: Final = (
    ":root{--bg:#fff;--fg:#1b1f24;--soft:#57606a;--line:#c8ced6;--box:#f5f7f9;--link:#0b5cad;"
    "--moe:#2b7bb8;--dense:#8b949e;--add:#e2f3e6;--del:#fbe4e6;"
    + _ramp(_LIGHT)
    + "}@media(prefers-color-scheme:dark){:root{--bg:#0f1419;--fg:#e4e8ec;--soft:#a3adb8;"
    "--line:#3a434d;--box:#181f27;--link:#7db8f0;--moe:#629fd3;--dense:#808a95;--add:#14341f;"
    "--del:#461d23;" + _ramp(_DARK) + "}}"
    "*{box-sizing:border-box}"
    "body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"
    "'Segoe UI',Roboto,'DejaVu Sans',sans-serif;overflow-wrap:anywhere}"
    "main,header,nav{max-width:1120px;margin:0 auto;padding:0 14px}"
    "header{padding-top:18px}h1{font-size:1.55rem;line-height:1.25;margin:0 0 4px}"
    "h2{font-size:1.25rem;margin:36px 0 10px;padding-top:10px;border-top:1px solid var(--line)}"
    "h3{font-size:1.02rem;margin:22px 0 8px}p{margin:8px 0;max-width:75ch}a{color:var(--link)}"
    ".soft,figcaption,caption{color:var(--soft)}.soft,figcaption,caption,table{font-size:.88rem}"
    "nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;padding:0;margin:10px 0}"
    "nav a{display:inline-block;padding:5px 0}"
    ".skip{position:absolute;left:-999px}.skip:focus{position:static}"
    ":focus-visible{outline:2px solid var(--link);outline-offset:2px}"
    ".scroll{overflow-x:auto;max-width:100%}"
    "table{border-collapse:collapse;min-width:100%;overflow-wrap:normal}"
    "caption{text-align:left;padding:0 0 6px}"
    "th,td{padding:4px 10px 4px 0;text-align:left;border-bottom:1px solid var(--line);"
    "vertical-align:top;font-variant-numeric:tabular-nums}"
    "tbody th{font-weight:500}th,td{white-space:nowrap}"
    ".num{text-align:right}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;"
    "margin:0}.tiles div{background:var(--box);border:1px solid var(--line);border-radius:6px;"
    "padding:9px 12px}.tiles dt{font-size:.84rem;color:var(--soft)}"
    ".tiles dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}"
    ".tiles dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}"
    "figure{margin:0 0 18px}figcaption{margin-bottom:4px}figcaption b{color:var(--fg)}"
    ".charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,336px),1fr));"
    "gap:8px 22px}.heats{display:grid;gap:8px 22px;"
    "grid-template-columns:repeat(auto-fill,minmax(min(100%,336px),1fr))}"
    "svg{display:block;max-width:none}svg text{fill:var(--soft);font-size:11px}"
    "svg .name{fill:var(--fg)}.heat path{fill:none;stroke-width:1;"
    "shape-rendering:crispEdges}.none{fill:var(--box);stroke:var(--line);stroke-width:.1}"
    ".axis{stroke:var(--line);stroke-width:1;fill:none}"
    ".curve{stroke:var(--moe);stroke-width:1.8;fill:none;stroke-linejoin:round}"
    ".dot{fill:var(--moe)}.band{fill:var(--moe);opacity:.2}"
    ".moe{fill:var(--moe)}.dense{fill:var(--dense)}"
    ".rest{fill:none;stroke:var(--moe);stroke-width:1.5;stroke-dasharray:3 2}"
    ".refused{fill:none;stroke:var(--dense);stroke-dasharray:1 2}"
    ".key{display:flex;flex-wrap:wrap;gap:3px 14px;list-style:none;padding:0;margin:6px 0 12px;"
    "font-size:.84rem;color:var(--soft)}.key li{display:flex;align-items:center;gap:6px}"
    ".key .sw{width:18px;height:13px;display:inline-block;border:1px solid var(--line)}"
    "pre{background:var(--box);border:1px solid var(--line);border-radius:6px;padding:10px 12px;"
    "margin:0 0 10px;overflow-x:auto;max-height:28rem;overflow-y:auto;font:12.5px/1.45 "
    "ui-monospace,SFMono-Regular,Menlo,'DejaVu Sans Mono',monospace;overflow-wrap:normal}"
    "pre span{display:block;width:max-content;min-width:100%}"
    ".add{background:var(--add)}.del{background:var(--del)}.at{color:var(--soft)}"
    "details{margin:0 0 8px}summary{cursor:pointer;padding:5px 0}details details{margin-left:14px}"
    ".miss{background:var(--box);border-left:4px solid var(--dense);padding:8px 12px;"
    "margin:14px 0}.miss ul{margin:4px 0;padding-left:20px}"
    ".two{display:grid;gap:10px 34px;grid-template-columns:minmax(0,350px) minmax(0,1fr)}"
    "@media(max-width:820px){.two{grid-template-columns:minmax(0,1fr)}}"
    "footer{max-width:1120px;margin:40px auto 20px;padding:0 14px;color:var(--soft);"
    "font-size:.85rem}@media print{pre{max-height:none}nav{display:none}}" + _CLASSES
)
