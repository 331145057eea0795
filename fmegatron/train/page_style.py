"""The style and the script of report.html: both inside the page, which asks no network for anything."""

STYLE = """
:root{--ink:#1f2328;--soft:#656d76;--line:#e3e6ea;--back:#fff;--card:#f7f8fa;
--s0:#2563b0;--s1:#c2570c;--s2:#2b7a4b;--s3:#7a4fb5;--s4:#b3822b;--s5:#a8324a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa4af;--line:#30363d;--back:#15181c;--card:#1d2126;
--s0:#6ea8ec;--s1:#f0955a;--s2:#66c08a;--s3:#b796ee;--s4:#e0b45c;--s5:#ec7d92}}
*{box-sizing:border-box}
body{font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;max-width:1000px;padding:24px}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:28px 0 10px}h3{font-size:14px;margin:14px 0 6px}
header p{margin:2px 0 16px;color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:10px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:8px 12px;min-width:110px}
.tile b{display:block;font-size:15px}.tile span,.what,.legend,summary{color:var(--soft);font-size:12px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:10px}
figcaption{font-weight:600;margin-bottom:4px}.what{font-weight:400;margin-left:4px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px}
.grid{stroke:var(--line)}.cursor{stroke:var(--soft);stroke-dasharray:3 3;visibility:hidden}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
polyline.s0,circle.s0{stroke:var(--s0)}polyline.s1,circle.s1{stroke:var(--s1)}polyline.s2,circle.s2{stroke:var(--s2)}
polyline.s3,circle.s3{stroke:var(--s3)}polyline.s4,circle.s4{stroke:var(--s4)}polyline.s5,circle.s5{stroke:var(--s5)}
circle{fill:var(--card)}
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}
.f3{fill:var(--s3)}.f4{fill:var(--s4)}.f5{fill:var(--s5)}
.key{display:inline-block;margin-right:12px}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
.b0{background:var(--s0)}.b1{background:var(--s1)}.b2{background:var(--s2)}.b3{background:var(--s3)}
.b4{background:var(--s4)}.b5{background:var(--s5)}
table{border-collapse:collapse;font-size:13px}
th{text-align:left;font-weight:400;color:var(--soft);padding:2px 16px 2px 0;vertical-align:top}
td{padding:2px 0;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:12px;overflow-x:auto;font-size:12px}
.ranks{display:grid;gap:4px;margin-top:8px;overflow-x:auto}
.rank{background:var(--card);border:1px solid var(--line);border-radius:4px;padding:3px 7px;font-size:12px}
#tip{position:fixed;display:none;pointer-events:none;background:var(--ink);color:var(--back);padding:5px 8px;border-radius:4px;
font-size:12px;white-space:pre;z-index:9}
"""

SCRIPT = """
const data=JSON.parse(document.getElementById("data").textContent),tip=document.getElementById("tip");
const left=62,right=12,width=460;
function nearest(points,x){let a=0,b=points.length-1;while(b-a>1){const m=(a+b)>>1;points[m][0]<x?a=m:b=m}
return Math.abs(points[a][0]-x)<=Math.abs(points[b][0]-x)?points[a]:points[b]}
for(const svg of document.querySelectorAll("svg.chart")){
const names=svg.dataset.keys.split(" "),first=+svg.dataset.first,last=+svg.dataset.last,cursor=svg.querySelector(".cursor");
svg.addEventListener("mousemove",event=>{
const box=svg.getBoundingClientRect(),at=(event.clientX-box.left)/box.width*width;
const x=first+(at-left)/(width-left-right)*(last-first);
const rows=names.map(name=>[name,nearest(data[name],x)]),step=rows[0][1][0];
const place=left+(step-first)/(last-first)*(width-left-right);
cursor.setAttribute("x1",place);cursor.setAttribute("x2",place);cursor.style.visibility="visible";
const say=([name,p])=>name+"  "+(+p[1].toPrecision(6))+(p[0]==step?"":"  (step "+p[0]+")");
tip.textContent="step "+step+"\\n"+rows.map(say).join("\\n");
tip.style.display="block";
tip.style.left=Math.min(event.clientX+14,innerWidth-tip.offsetWidth-8)+"px";tip.style.top=event.clientY+14+"px"});
svg.addEventListener("mouseleave",()=>{tip.style.display="none";cursor.style.visibility="hidden"})}
document.body.dataset.ready=document.querySelectorAll("svg.chart").length;
"""
