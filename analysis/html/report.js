"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const root = document.documentElement;
  const config = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const drawn = [];

  // -- theme: the system's until the reader chooses ------------------------------------------------------------------
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const themed = () => {
    const style = getComputedStyle(root);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { color: color("--fg"), gridcolor: color("--line"), linecolor: color("--line") };
    const of = (name) => Object.fromEntries(Object.entries(axis).map(([key, value]) => [`${name}.${key}`, value]));
    return {
      "font.color": color("--fg"), ...of("xaxis"), ...of("yaxis"),
      "hoverlabel.bgcolor": color("--card"), "hoverlabel.font.color": color("--fg"), "hoverlabel.bordercolor": color("--line"),
    };
  };
  const setTheme = (name) => {
    root.dataset.theme = name;
    $("theme").textContent = name === "dark" ? "Light" : "Dark";
    drawn.forEach((element) => Plotly.relayout(element, themed()));
  };
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => { if (!chosen) setTheme(dark.matches ? "dark" : "light"); });
  $("theme").addEventListener("click", () => { chosen = root.dataset.theme === "dark" ? "light" : "dark"; setTheme(chosen); });
  // paper is white
  window.addEventListener("beforeprint", () => setTheme("light"));

  // -- numbers -------------------------------------------------------------------------------------------------------
  const show = (value, digits = 4) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)) return value.toExponential(2);
    return String(+value.toPrecision(digits));
  };

  // -- figures -------------------------------------------------------------------------------------------------------
  const openOnClick = (element) =>
    element.on("plotly_click", (event) => {
      const run = event.points[0].customdata;
      if (typeof run === "string") openRun(run);
    });
  document.querySelectorAll("script.figure-data").forEach((script) => {
    const element = $(`figure-${script.dataset.name}`);
    const figure = JSON.parse(script.textContent);
    Plotly.newPlot(element, figure.data, figure.layout, config).then(() => {
      Plotly.relayout(element, themed());
      openOnClick(element);
    });
    drawn.push(element);
  });

  // -- a run ---------------------------------------------------------------------------------------------------------
  const runColumn = data.columns.findIndex((column) => column.name === "run");
  const cell = (kind, text, className) => {
    const element = document.createElement(kind);
    element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const openRun = (run) => {
    const row = data.runs.find((candidate) => candidate[runColumn] === run);
    const body = $("run").querySelector("tbody");
    body.replaceChildren();
    const add = (key, value, own) => {
      const line = document.createElement("tr");
      if (own) line.className = "differs";
      const head = cell("th", key);
      head.scope = "row";
      line.append(head, cell("td", value !== null && typeof value === "object" ? JSON.stringify(value) : show(value, 7)));
      body.append(line);
    };
    if (row) data.columns.forEach((column, i) => add(column.name, row[i], false));
    Object.entries(data.configs.runs[run] ?? {}).forEach(([key, value]) => add(`config: ${key}`, value, true));
    Object.entries(data.configs.shared).forEach(([key, value]) => add(`config: ${key} (all runs)`, value, false));
    $("run-title").textContent = run;
    if (!$("run").open) $("run").showModal();
  };

  // -- table of runs ---------------------------------------------------------------------------------------------------
  const PAGE = 200;
  let order = { column: null, up: true };
  let limit = PAGE;
  const heads = [...document.querySelectorAll("#table thead th")];
  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null) return 1;
    if (b === null) return -1;
    const direction = order.up ? 1 : -1;
    return typeof a === "number" && typeof b === "number" ? direction * (a - b) : direction * String(a).localeCompare(String(b));
  };
  // `loss nats < 3.2` and `model = dense` compare a column; anything else is words, all of which a row must hold.
  const test = (text) => {
    const found = text.match(/^\s*(.+?)\s*(<=|>=|<|>|=)\s*(.+?)\s*$/);
    const column = found ? data.columns.findIndex((c) => c.name.toLowerCase() === found[1].toLowerCase()) : -1;
    if (column >= 0) {
      const value = Number(found[3]);
      if (Number.isNaN(value)) return (row) => String(row[column]).toLowerCase() === found[3].toLowerCase();
      const ways = { "<": (x) => x < value, ">": (x) => x > value, "<=": (x) => x <= value, ">=": (x) => x >= value, "=": (x) => x === value };
      return (row) => row[column] !== null && ways[found[2]](row[column]);
    }
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    return (row) => { const line = row.map((v) => show(v, 6)).join(" ").toLowerCase(); return words.every((word) => line.includes(word)); };
  };
  const fill = () => {
    const keep = test($("filter").value);
    let rows = data.runs.filter(keep);
    if (order.column !== null) rows = [...rows].sort((a, b) => compare(a[order.column], b[order.column]));
    const body = document.querySelector("#table tbody");
    body.replaceChildren(...rows.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, i) => {
        if (i === runColumn) {
          const box = document.createElement("td");
          const button = cell("button", value, "open");
          button.type = "button";
          button.addEventListener("click", () => openRun(value));
          box.append(button);
          line.append(box);
        } else line.append(cell("td", show(value), data.columns[i].number ? "number" : ""));
      });
      return line;
    }));
    $("count").textContent = `${rows.length} of ${data.runs.length} runs`;
    $("more").hidden = rows.length <= limit;
    $("more").textContent = `Show all ${rows.length}`;
  };
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    order = { column: i, up: order.column === i ? !order.up : true };
    heads.forEach((other, k) => other.setAttribute("aria-sort", k === i ? (order.up ? "ascending" : "descending") : "none"));
    fill();
  }));
  $("filter").addEventListener("input", fill);
  $("more").addEventListener("click", () => { limit = Infinity; fill(); });
  window.addEventListener("beforeprint", () => { limit = Infinity; fill(); });
  fill();

  // -- explorer --------------------------------------------------------------------------------------------------------
  if (!data.explorers.length) return;
  const NAMES = { N: "parameters N", D: "training tokens D", R: "tokens per concept R", P: "backbone share P", loss: "predicted loss (nats/token)" };
  let mode = data.explorers[0];
  let at = 0;
  data.explorers.forEach((explorer, i) => $("mode").append(new Option(explorer.tokens ? `${explorer.unit}, ${show(explorer.tokens, 3)} training tokens` : explorer.unit, i)));
  // Position on an axis: the cell and the share of it. Ratios are even in their logarithm.
  const place = (axis, value, log) => {
    if (axis.length === 1) return [0, 0, 0];
    const f = log ? Math.log : (x) => x;
    const clamped = Math.min(Math.max(value, axis[0]), axis[axis.length - 1]);
    let i = 0;
    while (i < axis.length - 2 && clamped > axis[i + 1]) i += 1;
    return [i, i + 1, (f(clamped) - f(axis[i])) / (f(axis[i + 1]) - f(axis[i]))];
  };
  const between = (grid, share, ratio) => {
    if (!grid) return null;
    const [s0, s1, s] = place(mode.shares, share, false);
    const [r0, r1, r] = place(mode.ratios, ratio, true);
    const corners = [[grid[s0][r0], (1 - s) * (1 - r)], [grid[s1][r0], s * (1 - r)], [grid[s0][r1], (1 - s) * r], [grid[s1][r1], s * r]];
    let sum = 0;
    for (const [value, weight] of corners) {
      if (weight > 0 && value === null) return null;
      sum += weight * (value ?? 0);
    }
    return sum;
  };
  const choice = () => ({ ratio: Number($("ratio").value), share: Number($("share").value) });
  const surface = () => {
    const row = mode.budgets[at];
    const z = mode.regret[at].map((line, s) => line.map((value, r) => (value === null ? null : 100 * value / mode.loss[at][s][r])));
    const { ratio, share } = choice();
    const point = (x, y, name, symbol) => ({ type: "scatter", mode: "markers", x: [x], y: [y], name, marker: { symbol, size: 14, color: "#D55E00", line: { color: "#fff", width: 2 } }, hovertemplate: `${name}: R %{x:.3g}, P %{y:.3g}<extra></extra>` });
    const traces = [
      { type: "contour", x: mode.ratios, y: mode.shares, z, colorscale: "Cividis", reversescale: true, contours: { coloring: "heatmap", showlabels: true }, colorbar: { title: { text: "% above" }, thickness: 12 }, hovertemplate: "R %{x:.3g}, P %{y:.3g}: %{z:.2f}% above the least loss<extra></extra>" },
      point(row.R.value, row.P.value, "best", "star"),
      point(ratio, share, "your choice", "x"),
    ];
    const layout = {
      height: 380, margin: { l: 56, r: 8, t: 40, b: 48 }, modebar: { bgcolor: "rgba(0,0,0,0)", orientation: "v" }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      xaxis: { title: { text: "tokens per concept R" }, type: "log", zeroline: false }, yaxis: { title: { text: "backbone share P" }, zeroline: false },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    };
    Plotly.react($("surface"), traces, layout, config).then(() => Plotly.relayout($("surface"), themed()));
  };
  const update = (toBest) => {
    const row = mode.budgets[at];
    $("budget-text").textContent = `${show(row.budget, 3)} ${mode.unit}`;
    $("budget").setAttribute("aria-valuetext", `${show(row.budget, 3)} ${mode.unit}`);
    if (toBest) { $("ratio").value = show(row.R.value); $("share").value = show(row.P.value); }
    $("outside").hidden = !row.outside;
    $("outside").textContent = row.outside ? `Beyond the data: the best allocation of this budget is ${row.outside}. It is an extrapolation.` : "";
    $("best").tBodies[0].replaceChildren(...Object.entries(NAMES).map(([key, name]) => {
      const line = document.createElement("tr");
      const entry = row[key];
      const head = cell("th", name);
      head.scope = "row";
      const unknown = entry.status === "not identified";
      const text = unknown ? "not identified" : show(entry.value);
      const ends = entry.interval && !unknown && entry.status !== "held" ? `${show(entry.interval[0])} to ${show(entry.interval[1])}` : entry.status === "held" ? "held" : unknown ? `(edge of what was searched: ${show(entry.value)})` : "";
      line.append(head, cell("td", text, "number"), cell("td", ends));
      return line;
    }));
    const { ratio, share } = choice();
    const clamp = (x, axis) => Math.min(Math.max(x, axis[0]), axis[axis.length - 1]);
    // a value as it is printed may round to just outside
    const out = (x, axis) => Math.abs(clamp(x, axis) - x) > 1e-3 * Math.abs(x);
    const beyond = out(ratio, mode.ratios) || out(share, mode.shares);
    const lost = between(mode.regret[at], share, ratio);
    const [low, high, loss, N, D] = ["low", "high", "loss", "N", "D"].map((name) => (mode[name] ? between(mode[name][at], share, ratio) : null));
    $("regret").textContent = beyond
      ? `Beyond the data: R from ${show(mode.ratios[0])} to ${show(mode.ratios[mode.ratios.length - 1])} and P from ${show(mode.shares[0])} to ${show(mode.shares[mode.shares.length - 1])} were run. Nothing is said outside.`
      : lost === null ? "The budget pays for no such model."
      : `R = ${show(ratio)}, P = ${show(share)} (N = ${show(N, 3)}, D = ${show(D, 3)}) gives a predicted loss of ${show(loss, 5)}, ${show(lost, 3)} nats (${show(100 * lost / loss, 2)}%) above the least` + (low === null ? "." : `, 95% ${show(low, 3)} to ${show(high, 3)}.`);
    surface();
  };
  const setMode = (i) => {
    mode = data.explorers[i];
    at = Math.floor((mode.budgets.length - 1) / 2);
    $("budget").max = mode.budgets.length - 1;
    $("budget").value = at;
    update(true);
  };
  $("mode").addEventListener("change", () => setMode(Number($("mode").value)));
  $("budget").addEventListener("input", () => { at = Number($("budget").value); update(true); });
  $("ratio").addEventListener("change", () => update(false));
  $("share").addEventListener("change", () => update(false));
  $("to-best").addEventListener("click", () => update(true));
  drawn.push($("surface"));
  setMode(0);
  // a click on the surface chooses
  $("surface").on("plotly_click", (event) => {
    const { x, y } = event.points[0];
    $("ratio").value = show(Number(x));
    $("share").value = show(Number(y));
    update(false);
  });
})();
