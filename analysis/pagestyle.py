"""How the page of a report looks: on a phone, on a screen, on paper; in light and in dark.

Colours are variables, which figures use too (`analysis.figures.style`). May import: nothing.
"""

__all__ = ("CSS",)

CSS = """\
:root {
  color-scheme: light dark;
  --ink: #1a1b1c; --muted: #595b5e; --grid: #d9dbde; --paper: #ffffff; --shade: #f3f4f6;
  --link: #0a58a6; --good: #1d6f42; --warn: #8a5300; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e7e9; --muted: #a4a8ae; --grid: #3b3f45; --paper: #15171a; --shade: #1f2226;
    --link: #7ab8ff; --good: #62c08c; --warn: #f0b15b; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 66rem; padding: 1rem clamp(0.9rem, 4vw, 2.5rem) 4rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.35rem; line-height: 1.25; margin: 0.5rem 0 0.8rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.08rem; line-height: 1.3; margin: 2.4rem 0 0.6rem; padding-top: 0.5rem;
  border-top: 1px solid var(--grid);
}
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.verdict {
  max-width: none; padding: 0.55rem 0.8rem; border-left: 0.35rem solid; background: var(--shade);
  font-weight: 650;
}
.good { border-color: var(--good); }
.warn { border-color: var(--warn); }
.bad { border-color: var(--bad); }
.reservations { margin: 0.6rem 0; padding-left: 1.2rem; color: var(--muted); font-size: 0.92rem; }
.reservations li { max-width: 46rem; overflow-wrap: anywhere; }
.numbers { display: flex; flex-wrap: wrap; gap: 0.5rem; margin: 1rem 0; }
.numbers div {
  flex: 1 1 6.5rem; padding: 0.5rem 0.7rem; border-radius: 0.4rem; background: var(--shade);
}
.numbers dt { color: var(--muted); font-size: 0.82rem; }
.numbers dd { margin: 0; font-size: 1.25rem; font-weight: 650; font-variant-numeric: tabular-nums; }
nav ul {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1.1rem; list-style: none; margin: 0; padding: 0;
  font-size: 0.92rem;
}
nav a { display: inline-block; padding: 0.3rem 0; }
.scroll {
  overflow-x: auto; max-width: 100%;
  /* A shadow at an edge beyond which there is more. */
  background:
    linear-gradient(to right, var(--paper) 60%, transparent) left / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 60%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to right, var(--grid), transparent) left / 0.8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--grid), transparent) right / 0.8rem 100% no-repeat scroll;
}
table { border-collapse: collapse; font-size: 0.92rem; margin: 0.4rem 0; }
th, td { padding: 0.28rem 0.75rem 0.28rem 0; text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--grid); }
tbody tr + tr { border-top: 1px solid var(--grid); }
th:first-child, td:first-child { padding-left: 0.4rem; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.t:last-child { min-width: 8rem; overflow-wrap: anywhere; }
td.t:not(:last-child) { white-space: nowrap; }
.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 0.9rem; margin: 0.5rem 0;
}
.facts dt { color: var(--muted); }
.facts dd { margin: 0; max-width: 46rem; overflow-wrap: anywhere; }
.entry {
  margin: 0.8rem 0; padding: 0.1rem 0 0.1rem 0.9rem; border-left: 0.25rem solid var(--grid);
}
.entry.bad { border-color: var(--bad); }
.entry.warn { border-color: var(--warn); }
.lead { font-weight: 600; }
pre {
  margin: 0.5rem 0; padding: 0.5rem 0.7rem; background: var(--shade);
  font: 0.82rem/1.45 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
}
.scroll > pre { width: max-content; min-width: 100%; }
figure { margin: 1.4rem 0; max-width: 48rem; break-inside: avoid; }
figure svg { display: block; width: 100%; min-width: 20rem; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: "DejaVu Sans", Verdana, sans-serif !important; }
@media (max-width: 40rem) {
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dt { margin-top: 0.4rem; }
  table { font-size: 0.86rem; }
  th, td { padding-right: 0.6rem; }
}
@media print {
  :root {
    --ink: #000; --muted: #444; --grid: #bbb; --paper: #fff; --shade: #f3f4f6;
    --link: #000; --good: #1d6f42; --warn: #8a5300; --bad: #b3261e;
  }
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  h2 { break-after: avoid; }
  tr, .entry, .numbers, .short { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; background: none; }
  .scroll > pre { width: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
  td.t:not(:last-child) { white-space: normal; }
  figure { max-width: 13.5cm; }
  figure svg { min-width: 0; }
}
"""
