// The live page: asks the server for the runs that are ticked, every two seconds, and draws them.
// Text of a run only ever becomes text (textContent, or a trace's name without markup).
"use strict";

const EVERY = 2000; // milliseconds
const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];
const CONFIG = { responsive: true, displayModeBar: false };
const plotly = new Promise((loaded) => addEventListener("DOMContentLoaded", loaded));
const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search).getAll("run");
const page = { charts: [], chosen: asked.length ? [...new Set(asked)] : null, runs: new Map(),
  stale: false, listed: 0 };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const colour = (i) => css(`--c${i % 8}`);
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // for plotly's names

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (answer.status === 204 || answer.status === 404) return null;
  if (!answer.ok) throw new Error((await answer.text()).slice(0, 200));
  return answer.json();
}

async function list() {
  const answer = await ask("/api/runs");
  if (page.listed === 0) {
    page.chosen ??= answer.chosen;
    page.charts = answer.charts;
    $("picker").open = page.chosen.length === 0;
  }
  const boxes = answer.runs.map((run) => {
    const box = make("input", { type: "checkbox", value: run.name });
    box.checked = page.chosen.includes(run.name);
    box.onchange = () => choose(run.name, box.checked);
    const when = run.written ? new Date(1000 * run.written).toLocaleString() : "";
    return make("label", {}, box, make("span", { textContent: run.name }),
      make("span", { className: "soft", textContent: `${run.status} ${when}` }));
  });
  $("runs").replaceChildren(...boxes);
  page.listed = Date.now();
}

function choose(name, ticked) {
  page.chosen = page.chosen.filter((other) => other !== name);
  if (ticked) page.chosen.push(name);
  const query = new URLSearchParams(page.chosen.map((run) => ["run", run]));
  history.replaceState(null, "", query.size ? `?${query}` : "/");
  refresh(true);
}

// listing: what has to be there besides before anything is drawn.
async function refresh(anyway = false, listing = null) {
  const asking = Promise.all(page.chosen.map(async (name) => {
    const have = page.runs.get(name)?.tag ?? "";
    const run = await ask(`/api/run?${new URLSearchParams({ name, have })}`);
    if (run) page.runs.set(name, run);
    page.stale ||= run !== null;
  }));
  await Promise.all([asking, listing, plotly]);
  for (const name of page.runs.keys()) if (!page.chosen.includes(name)) page.runs.delete(name);
  const runs = page.chosen.map((name) => page.runs.get(name)).filter((run) => run);
  if (anyway || page.stale) draw(runs);
  page.stale = false;
  tell(runs);
  return runs.every((run) => run.read);
}

function draw(runs) {
  $("heads").replaceChildren(...(runs.length > 1 ? [compared(runs)] : []), ...runs.map(head));
  page.charts.forEach((chart, i) => drawChart(chart, i, runs));
  drawGrids(runs);
  document.title = runs.length ? `${runs.map((run) => run.name).join(", ")} · onpolicy` : "onpolicy";
}

function tell(runs) {
  const states = runs.map((run) => {
    if (!run.read) return `${run.name}: reading, step ${run.lines} so far`;
    if (run.complete) return `${run.name}: ended`;
    const ago = Math.max(0, Math.round(Date.now() / 1000 - run.written));
    return run.written ? `${run.name}: last line ${ago} s ago` : `${run.name}: no metrics yet`;
  });
  $("state").textContent = states.join(" · ") || "tick a run";
}

function swatch(i) {
  const square = make("span", { className: "swatch" });
  square.style.background = colour(i);
  return square;
}

const tilesOf = (run) => [...run.tiles, ...run.rates.map(([label, value]) => [label, value, ""])];

// The headline numbers of several runs as a table, a row a run.
function compared(runs) {
  const labels = [...new Set(runs.flatMap((run) => tilesOf(run).map(([label]) => label)))];
  const rows = runs.map((run, i) => {
    const values = new Map(tilesOf(run).map(([label, value, remark]) => [label, [value, remark]]));
    return make("tr", {}, make("th", { className: "left" }, swatch(i), run.name),
      ...labels.map((label) => {
        const [textContent, title] = values.get(label) ?? ["", ""];
        return make("td", { textContent, title });
      }));
  });
  const header = ["", ...labels].map((text) => make("th", { textContent: text, className: "wrap" }));
  return make("div", { className: "card scroll" }, make("table", {}, make("tr", {}, ...header), ...rows));
}

function head(run, i, runs) {
  const tiles = runs.length > 1 ? [] : tilesOf(run);
  return make("section", { className: "head" },
    make("h2", {}, swatch(i), run.name, " ", make("span", { className: "soft", textContent: run.subtitle })),
    ...run.notes.map((text) => make("div", { className: "card note", textContent: text })),
    make("div", { className: "tiles" }, ...tiles.map(([label, value, remark]) =>
      make("div", { className: "tile" }, make("span", { className: "soft", textContent: label }),
        make("b", { textContent: value }), make("span", { className: "soft", textContent: remark })))),
    make("p", { textContent: run.sentence, hidden: runs.length > 1 }),
    make("p", { textContent: run.ledger,
      className: run.balanced === null ? "soft" : run.balanced ? "good" : "bad" }));
}

// Names of a chart's series that any of the runs has; `x.*` is every `x.` that has left zero.
function seriesOf(chart, runs) {
  return chart.series.flatMap((name) => {
    if (!name.endsWith("*")) return runs.some((run) => run.curves[name]?.y.length) ? [name] : [];
    const names = runs.flatMap((run) => Object.entries(run.curves)
      .filter(([key, curve]) => key.startsWith(name.slice(0, -1)) && curve.y.some((y) => y !== 0))
      .map(([key]) => key));
    return [...new Set(names)];
  });
}

function trace(run, name, i, j, several) {
  const { x, y } = run.curves[name];
  const short = name.replace("retired_total.", "");
  return { x, y, type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers",
    name: plain(several ? `${run.name} ${short}` : short), meta: [run.name, name],
    line: { width: 1.4, color: colour(several ? i : j), dash: several ? DASHES[j % 5] : "solid" },
    marker: { size: 4 } };
}

function drawChart(chart, index, runs) {
  const series = seriesOf(chart, runs);
  const card = $(`chart-${index}`) ?? $("charts").appendChild(chartCard(chart, index));
  card.hidden = series.length === 0;
  if (card.hidden) return;
  const traces = runs.flatMap((run, i) => series.flatMap((name, j) =>
    (run.curves[name] ? [trace(run, name, i, j, runs.length > 1)] : [])));
  const axis = { gridcolor: css("--line"), gridwidth: 0.5, linecolor: css("--line"), zeroline: false,
    automargin: true };
  const layout = { uirevision: "keep", showlegend: true, hovermode: "x",
    margin: { l: 48, r: 8, t: 8, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 11, color: css("--ink") },
    legend: { orientation: "h", y: -0.22, yanchor: "top" }, autosize: true,
    xaxis: { ...axis, title: { text: "step", standoff: 2 } }, yaxis: { ...axis, rangemode: "tozero" } };
  const plot = card.querySelector(".plot");
  plot.style.height = `${240 + 9 * traces.length}px`; // the key stands below
  Plotly.react(plot, traces, layout, CONFIG);
}

function chartCard(chart, index) {
  const title = make("h3", { textContent: chart.title });
  if (chart.unit) title.append(" ", make("span", { className: "soft", textContent: chart.unit }));
  return make("figure", { id: `chart-${index}`, className: "card" }, title,
    make("div", { className: "soft", textContent: chart.remark }), make("div", { className: "plot" }));
}

function drawGrids(runs) {
  const titles = [...new Set(runs.flatMap((run) => run.grids.map((grid) => grid.title)))];
  $("grids-title").hidden = titles.length === 0;
  const choice = $("measure"), before = [...choice.options].map((option) => option.value);
  if (titles.join() !== before.join()) { // left alone else: it may be open
    const kept = choice.value;
    choice.replaceChildren(...titles.map((title) =>
      make("option", { textContent: title, selected: title === kept })));
  }
  choice.onchange = () => drawGrids(runs);
  $("grids").replaceChildren(...runs.map((run) => gridCard(run, choice.value)));
}

function gridCard(run, measure) {
  const grid = run.grids.find((one) => one.title === measure);
  return make("div", { className: "card", hidden: !grid }, make("h3", { textContent: run.name }),
    ...(grid ? [make("div", { className: "soft", textContent: grid.unit }), table(grid)] : []));
}

function table(grid) {
  const header = ["age ↓ reuse →", ...grid.columns].map((text) => make("th", { textContent: text }));
  const rows = grid.rows.map(([label, cells]) => make("tr", {}, make("th", { textContent: label }),
    ...cells.map((cell) => {
      const box = make("td", { textContent: cell?.text ?? "" });
      if (cell) box.style.setProperty("--h", cell.heat);
      return box;
    })));
  return make("div", { className: "scroll" }, make("table", {}, make("tr", {}, ...header), ...rows));
}

async function turn() {
  let whole = true;
  try {
    if (!document.hidden) {
      const listing = Date.now() - page.listed > 10000 ? list() : null;
      if (page.chosen === null) await listing;
      whole = await refresh(false, listing);
      if (whole) document.body.dataset.ready = "yes";
    }
  } catch (error) {
    $("state").textContent = `no answer from the server: ${error.message}`;
  }
  setTimeout(turn, whole ? EVERY : 0);
}

turn();
