# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Style and script of the HTML report; both are part of the page, which loads no other file."""

from __future__ import annotations

import base64
import hashlib


STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f5f7f8; --ink: #1d2a35; --soft: #576672; --line: #dbe2e6;
  --chosen: #b8303f; --all: #30638e; --head: #6f7b86; --track: #e8edf0; --heat: 42 122 184; --depth: .52;
  --good: #1f7a4d; --warn: #a15c00; }
@media (prefers-color-scheme: dark) { :root { --paper: #12181d; --panel: #1a2228; --ink: #e6ecf0; --soft: #9fb0bc;
  --line: #2f3b44; --chosen: #ff8591; --all: #7db4e0; --head: #9aa7b2; --track: #27323a; --heat: 74 160 224;
  --depth: .55; --good: #62c796; --warn: #f0b35a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, footer { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { border-top: 5px solid var(--chosen); padding-top: 1.6rem; }
h1 { font-size: 1.95rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; letter-spacing: -.005em; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--all); }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.facts div { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .85rem; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.facts small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.box { border: 1px solid var(--line); border-left: 6px solid var(--tone); border-radius: 8px; background: var(--panel);
  padding: .7rem 1.1rem .8rem; }
.box h2 { margin: 0 0 .2rem; font-size: 1.12rem; }
.box ul { margin: .5rem 0 0; padding-left: 1.15rem; max-width: 48rem; }
.yes { --tone: var(--good); } .no { --tone: var(--warn); } .unknown { --tone: var(--head); }
.code { position: relative; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow: auto;
  max-height: 24rem; margin: .6rem 0; font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.code button { position: absolute; top: .5rem; right: .5rem; }
button { font: inherit; font-size: .82rem; color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .15rem .6rem; cursor: pointer; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; caption-side: top; padding: .2rem 0 .4rem; }
th, td { padding: .34rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
.right { text-align: right; } .line { white-space: nowrap; } .module { min-width: 15rem; } .wide { width: 100%; }
.why { min-width: 15rem; width: 36%; color: var(--soft); font-size: .8rem; line-height: 1.4; }
tr.hit > th, tr.hit td:not(.why) { font-weight: 650; }
tr.hit > :first-child { box-shadow: inset 4px 0 var(--chosen); }
th button { border: 0; background: none; padding: 0; color: inherit; font-size: inherit; font-weight: 600;
  text-align: inherit; }
th button::after { content: "\\00a0\\2195"; opacity: .45; }
[aria-sort=ascending] button::after { content: "\\00a0\\2191"; opacity: 1; }
[aria-sort=descending] button::after { content: "\\00a0\\2193"; opacity: 1; }
.heat { border-collapse: separate; border-spacing: 3px; }
.heat th { border: 0; font-size: .82rem; font-weight: 600; color: var(--soft); padding: .2rem .45rem;
  vertical-align: middle; }
.heat thead th { text-align: center; vertical-align: bottom; line-height: 1.25; max-width: 9rem; }
.heat thead span { display: inline-block; } .heat caption { white-space: nowrap; }
.heat tbody th { position: sticky; left: 0; background: var(--paper); text-align: right; z-index: 1; }
.heat td { text-align: center; min-width: 6rem; height: 3rem; padding: .2rem .3rem; border: 2px solid transparent;
  border-radius: 6px; vertical-align: middle; line-height: 1.2;
  background: rgb(var(--heat) / calc(var(--q) * var(--depth))); }
.heat.dense { border-spacing: 2px; } .heat.dense td { height: 1.7rem; padding: 0 .3rem; }
.heat small { display: inline-block; font-size: .74rem; margin: 0 .25rem; }
.heat td.hit { border: 3px solid var(--chosen); font-weight: 700; }
.heat td.sum { background: none; color: var(--soft); } .heat td.none { background: none; color: var(--line); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; align-items: center; }
.ramp { display: inline-block; width: 7rem; height: .8rem; border-radius: 4px; vertical-align: -.05rem;
  background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat) / var(--depth)));
  border: 1px solid var(--line); }
.frame { display: inline-block; width: 1.5rem; height: 1rem; border: 3px solid var(--chosen); border-radius: 4px;
  vertical-align: -.15rem; }
.span { display: inline-block; position: relative; width: 3.5rem; height: .5rem; border-radius: 3px;
  background: var(--track); margin-left: .5rem; vertical-align: .05rem; }
.span i { position: absolute; top: 0; bottom: 0; min-width: 3px; left: calc(var(--a) * 100%);
  width: calc(var(--w) * 100%); background: var(--all); border-radius: 3px; }
figure { margin: .8rem 0; }
.charts { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem 2rem; align-items: start; }
.charts > :only-child { max-width: 44rem; }
@media (min-width: 60rem) { .charts { grid-template-columns: minmax(0, 1.35fr) minmax(0, 1fr); } }
.charts svg { width: 100%; max-width: 42rem; height: auto; display: block; }
.charts svg text { fill: var(--ink); }
details { margin: 2.4rem 0 1rem; }
summary { cursor: pointer; font-weight: 650; font-size: 1.1rem; }
footer { margin: 2.5rem auto 2rem; padding-top: .8rem; border-top: 1px solid var(--line); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 44rem) {
  body { font-size: 15px; } main, footer { padding: 0 .9rem; } h1 { font-size: 1.55rem; }
  .code pre { padding-top: 2.4rem; } .heat { border-spacing: 2px; }
  .heat td { min-width: 2.9rem; font-size: .74rem; padding: .1rem; }
  .heat small { font-size: .66rem; display: block; margin: 0; }
  .heat thead th { padding: .3rem .1rem; }
  .heat thead th span { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; max-height: 12rem; }
  .heat tbody th { padding: .1rem .3rem; }
}
@media print {
  :root { color-scheme: light; } body { font-size: 11px; } .code button { display: none; } pre { max-height: none; }
  .scroll { overflow: visible; } .box, figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  th button::after { content: none; } .why, .module { min-width: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
const value = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const [a, b] = [value(one, column), value(two, column)];
        const order = a === "" || b === "" || isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
for (const block of document.querySelectorAll(".code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block.querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
"""


def content_policy() -> str:
    """The Content-Security-Policy: inline style, the one inline script, no other resource."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
