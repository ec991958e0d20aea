// The page: rows are joined from its data, filtered by the table, and drawn by the charts.
const { embed, DataTable } = { embed: window.vegaEmbed, DataTable: window.DataTable };
const page = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MAX_LINES = 60; // more rows than these are not readable in one chart
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const state = { model: 0, column: "", against: "zeros", methods: new Set(), sparsities: new Set() };
let table = null, rows = [];

// Every text goes through here: nothing of the data is ever read as HTML.
function element(tag, text = "", attributes = {}) {
  const node = document.createElement(tag);
  node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// ---------------------------------------------------------------- rows

const model = () => page.models[state.model];
const column = () => model().columns.find(({ key }) => key === state.column);

function joined() {
  const scores = model().scores[state.column], sign = column().metric.endsWith("+") ? -1 : 1;
  const loss = ({ value }) => (typeof value === "number" ? sign * value : Infinity);
  const sparsity = (row) => (row.method === "dense" ? -1 : row.ratio + (row.pattern ? 1e-6 : 0));
  return model().rows.filter(({ id }) => id in scores).map((row) => ({ ...row, ...scores[row.id] }))
    .sort((a, b) => sparsity(a) - sparsity(b) || (a.sparsity ?? "").localeCompare(b.sparsity ?? "") || loss(a) - loss(b) || a.order - b.order)
    .map((row, order) => ({ ...row, order }));
}

function passes(row) {
  if (row.method === "dense" && !row.hollow) return true;
  return (row.short || row.hollow || $("all").checked)
    && (!state.methods.size || state.methods.has(row.method))
    && (!state.sparsities.size || state.sparsities.has(row.sparsity));
}

// ---------------------------------------------------------------- charts

const drawings = new Map(); // figure -> what it shows; drawn when it comes into view

const observer = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) draw(target);
}, { rootMargin: "300px" });

function show(figure, { spec, title, hint = "", description, data, published = [], columns }) {
  figure.hidden = !data.some((row) => row.method !== "dense") && !published.length;
  if (figure.hidden) return;
  drawings.set(figure, { spec, title, description, data, published, columns, stale: true });
  const heading = figure.querySelector("figcaption strong");
  heading.textContent = title;
  heading.title = hint;
  figure.querySelector("summary .hidden").textContent = ` of ${title}`;
  figure.querySelector("[role=region]").setAttribute("aria-label", `Data of ${title}`);
  fillData(figure);
  observer.unobserve(figure);
  observer.observe(figure); // reports at once where the figure is in view
}

async function draw(figure) {
  const drawing = drawings.get(figure);
  if (!drawing?.stale) return;
  drawing.stale = false;
  const plot = figure.querySelector(".plot");
  drawing.width = plot.clientWidth;
  const theme = page.themes[dark.matches ? "dark" : "light"];
  const all = [...drawing.data, ...drawing.published];
  const values = {
    ...theme.params,
    methods: [...new Set(all.map((row) => row.method))].filter((name) => name && name !== "dense").sort(),
    narrow: drawing.width < 430,
    columns: Math.max(2, Math.floor(drawing.width / 110)),
  };
  // a step a line, as a number: with a step, Vega-Lite warns that it cannot fit the height as well
  const { step } = drawing.spec.height, lines = new Set(all.filter((row) => row.method !== "dense").map((row) => row.module ?? row.id));
  const spec = {
    ...drawing.spec,
    height: step ? step * lines.size : drawing.spec.height,
    description: `${drawing.description} The values are in the table below.`,
    datasets: { rows: drawing.data, published: drawing.published },
    params: drawing.spec.params.map(({ name }) => ({ name, value: values[name] })),
  };
  const { view } = await embed(plot, spec, {
    mode: "vega-lite", renderer: "svg", config: theme.config,
    logLevel: 1, // an empty layer is no reason to warn
    ast: true, // the page's policy allows no eval
    actions: { export: true, source: false, compiled: false, editor: false },
    downloadFileName: `${model().name} ${drawing.title}`.replace(/[^\w.-]+/g, "-"),
    tooltip: { theme: dark.matches ? "dark" : "light" },
  });
  plot.querySelector("summary")?.setAttribute("aria-label", `Save ${drawing.title}`);
  plot.querySelector("summary svg")?.setAttribute("aria-hidden", "true");
  view.addEventListener("click", (_, item) => item?.datum?.id && openRow(item.datum.id));
}

// a chart follows its width by itself, but not the columns of its legend and which labels it has
window.addEventListener("resize", () => {
  for (const [figure, drawing] of drawings) {
    const width = figure.querySelector(".plot").clientWidth;
    if (drawing.stale || !width || width === drawing.width) continue;
    drawing.stale = true;
    observer.unobserve(figure);
    observer.observe(figure);
  }
});

function fillData(figure) {
  if (!drawings.has(figure)) return; // nothing to show of this model
  const details = figure.querySelector("details.data"), { data, published, columns, title } = drawings.get(figure);
  const box = details.querySelector("[role=region]");
  box.replaceChildren();
  if (!details.open) return;
  const grid = element("table"), head = grid.createTHead().insertRow(), body = grid.createTBody();
  grid.createCaption().textContent = title;
  grid.caption.className = "hidden";
  head.append(...columns.map(([name]) => element("th", name, { scope: "col" })));
  for (const row of [...data, ...published]) {
    const line = body.insertRow();
    columns.forEach(([, value], place) => {
      const text = String(value(row) ?? "-");
      line.append(place ? element("td", text) : element("th", text, { scope: "row" }));
    });
  }
  box.append(grid);
}

const percent = (ratio) => (ratio === undefined ? "-" : `${(100 * ratio).toFixed(1)}%`);
const scoreColumns = () => [
  ["row", (row) => row.name], ["zeros", (row) => percent(row.zeros)],
  [column().title, (row) => row.text], ["against dense", (row) => row.relative],
  ["size", (row) => row.size], ["decode", (row) => row.decode], ["seeds", (row) => row.seeds],
  ["source", (row) => row.source],
].filter(([name]) => (name !== "source" || published().length)
  && (!["size", "decode"].includes(name) || rows.some((row) => row[name] !== undefined)));
const published = () => (model().published[state.column] ?? []).filter(passes);

function showCharts() {
  const { title, id: hint, metric } = column();
  const shown = rows.filter(passes);
  show($("trade-off"), {
    spec: page.charts.tradeOff[metric][state.against], data: shown, columns: scoreColumns(),
    published: state.against === "zeros" ? published() : [], hint,
    title: `${title} against ${page.against[state.against]}`,
    description: "A point a row, the dense model as a dashed line, the Pareto front as a wide line.",
  });
  const lines = shown.slice(0, MAX_LINES + 1);
  show($("lines"), {
    spec: page.charts.lines[metric], data: lines, title, hint, columns: scoreColumns(),
    description: "One line a row with its value, and its deviation over seeds.",
  });
  $("lines").querySelector("figcaption span").textContent = (shown.length > lines.length
    ? `The first ${MAX_LINES} of ${shown.length - 1} rows: filter to see others. ` : "") + page.errors;
  const ours = shown.filter((row) => published().some((value) => value.method === row.method && value.sparsity === row.sparsity));
  show($("published-chart"), {
    spec: page.charts.lines[metric], title: `${title}, published and ours`, hint, columns: scoreColumns(),
    data: published().length ? [...rows.filter((row) => row.method === "dense"), ...ours, ...published()].sort(beside) : [],
    description: "One line a value: published ones are hollow diamonds.",
  });
  // what follows has nothing to do with the score: rows that have none are there too
  const known = new Map(model().rows.filter(passes).map((row) => [row.id, row]));
  showCosts(known);
  showCurves(known);
  showLayers();
  showPublished();
  showProvenance(known);
}

// published values stand below ours of the same method and sparsity
function beside(a, b) {
  const key = (row) => `${(row.zeros ?? 0).toFixed(2)} ${row.pattern ? 1 : 0} ${row.sparsity} ${row.method} ${row.hollow ? 1 : 0}`;
  return key(a).localeCompare(key(b));
}

function showCosts(shown) {
  const figures = [];
  for (const [place, machine] of model().machines.entries()) {
    for (const [quantity, { title, spec }] of Object.entries(page.charts.costs)) {
      const data = model().costs.filter((cost) => cost.machine === machine && cost[quantity] !== undefined && shown.has(cost.id))
        .map((cost) => costRow(cost, quantity, shown.get(cost.id))).slice(0, MAX_LINES);
      const id = `cost-${place}-${quantity}`;
      const figure = $(id) ?? $("lines").cloneNode(true);
      if (figure.id !== id) {
        figure.id = id;
        figure.querySelector(".plot").replaceChildren();
        figure.querySelector("details.data").open = false;
        figure.querySelector("figcaption span").textContent = machine;
      }
      figures.push([figure, { spec, data, title, columns: costColumns, description: `One line a row, on ${machine}.` }]);
    }
  }
  $("costs").replaceChildren(...figures.map(([figure]) => figure));
  for (const [figure, drawing] of figures) show(figure, { ...drawing, data: drawing.data });
  const why = model().rows.find((row) => row.speed)?.speed; // of a bench without speed: the reason
  $("speed").textContent = model().rows.some((row) => row.decode || row.prefill)
    ? "Speed of the pruned models is in the table, measured beside dense in one run."
    : `Speed of the pruned models: not measured${why ? `, ${why}; bytes are computed` : ""}.`;
}

function costRow(cost, quantity, row) {
  const value = cost[quantity], several = quantity === "seconds" && cost.runs > 1;
  const { low, high, beyond, best, ...rest } = row;
  return { ...rest, ...cost, shown: value, text: costText(quantity, value), ...(several ? { low: cost.least, high: cost.most } : {}) };
}

const costText = (quantity, value) => (quantity === "seconds" ? duration(value) : `${value.toFixed(2)} GB`);

function duration(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "m"]]) {
    if (seconds >= 0.9995 * size) return `${(seconds / size).toFixed(seconds / size >= 9.95 ? 0 : 1)} ${unit}`;
  }
  return `${seconds.toFixed(seconds < 0.95 ? 1 : 0)} s`;
}
const costColumns = [
  ["row", (row) => row.name], ["prune time in s", (row) => row.seconds],
  ["fastest and slowest", (row) => (row.runs > 1 ? `${row.least} to ${row.most}` : "-")],
  ["peak memory of host in GB", (row) => row.host], ["peak memory of GPU in GB", (row) => row.gpu],
  ["runs", (row) => row.runs],
];

function showCurves(shown) {
  const curves = model().curves.filter(({ id }) => shown.has(id)), few = curves.slice(0, page.maxCurves);
  $("learning").hidden = !model().curves.length;
  show($("curves"), {
    spec: page.charts.curves, title: "Perplexity of the hard mask on held-out training text",
    data: few.flatMap(({ id, method, training, points }) =>
      points.map(([step, tokens, value]) => ({ id, method, training, step, tokens, value }))),
    columns: [["training", (row) => row.training], ["step", (row) => row.step],
      ["tokens", (row) => row.tokens.toLocaleString("en")], ["held-out perplexity", (row) => row.value.toPrecision(4)]],
    description: "One line a training; lower is better.",
  });
  $("curves").querySelector("figcaption span").textContent =
    "Windows of the training text that were not learned from; step 0 is the prior."
    + (few.length < curves.length ? ` The first ${few.length} of ${curves.length} trainings, in the order of the table.` : "");
}

function showLayers() {
  const heat = model().heat;
  $("by-layer").hidden = !heat;
  if (!heat) return;
  const run = heat.runs[Number($("run").value)];
  for (const [figure, quantity] of [[$("layer-sparsity"), "ratio"], [$("layer-loss"), "loss"]]) {
    const { values, ends } = run[quantity] ?? { values: [] };
    const text = (value) => (value === null ? "-" : quantity === "ratio" ? percent(value) : Number(value.toPrecision(3)));
    const data = values.map((value, place) => ({
      id: run.id, module: heat.modules[Math.floor(place / heat.blocks.length)],
      block: heat.blocks[place % heat.blocks.length], value, low: ends[0], high: ends[1],
    }));
    show(figure, {
      spec: page.charts.layers[quantity], data, title: `${page.layerTitles[quantity]}: ${run.name}`,
      description: `${heat.modules.length} kinds of layers in ${heat.blocks.length} blocks.`,
      columns: [["module", (row) => row.module], ["block", (row) => row.block], [page.layerTitles[quantity], (row) => text(row.value)]],
    });
  }
}

function showPublished() {
  const values = model().twins, box = $("published");
  box.querySelector(":scope > .twins")?.remove();
  const grid = element("div", "", { class: "wide twins", role: "region", tabindex: "0", "aria-label": "Published values beside ours" });
  const list = values.filter((value) => passes({ ...value, hollow: true }));
  const total = Object.values(model().published).flat().length;
  grid.append(element("p", total
    ? `${total} published value${total > 1 ? "s" : ""} under these protocols, ${values.length} beside a row of ours.`
    : "No published value has this model and one of these protocols."));
  if (list.length) {
    const lines = element("table"), head = lines.createTHead().insertRow(), body = lines.createTBody();
    const names = ["method", "sparsity", "score", "published", "ours", "difference", "", "source"];
    head.append(...names.map((name) => element("th", name, { scope: "col" })));
    for (const { method, sparsity, score, id, theirs, ours, difference, verdict, source } of list) {
      const texts = [[sparsity], [score, { title: id }], [theirs], [ours], [difference], [verdict], [source]];
      body.insertRow().append(element("th", method, { scope: "row" }), ...texts.map((text) => element("td", ...text)));
    }
    grid.append(lines);
  }
  box.append(grid);
}

// ---------------------------------------------------------------- the table

DataTable.ext.type.order["missing-last-asc"] = (a, b) => (a === "") - (b === "") || a - b;
DataTable.ext.type.order["missing-last-desc"] = (a, b) => (a === "") - (b === "") || b - a;
DataTable.ext.search.push((settings, _, index, row) => settings.nTable.id !== "table" || passes(row));

// A column of numbers: its text, what it sorts by, and, where it is more than text, its element.
function numeric(title, text, key, node) {
  return {
    title, type: "missing-last", className: "number", data: null,
    render: (row, kind) => {
      if (kind === "sort" || kind === "type") return sortKey(key(row));
      return kind === "display" && node ? node(row) : text(row) ?? "-";
    },
  };
}
const sortKey = (value) => (value === undefined || value === null ? "" : value === "inf" ? Infinity : value === "-inf" ? -Infinity : value);

const scoreText = (row) => row.text?.replace(/^dense /, "");

function scoreNode(row) {
  const node = element("span"), text = scoreText(row) ?? "-";
  if (row.tie) node.append(element("span", "~", { "aria-hidden": "true" }), element("span", "within noise of the best: ", { class: "hidden" }));
  node.append(row.best ? element("strong", text) : text);
  if (row.best) node.append(element("span", ", the best", { class: "hidden" }));
  return node;
}

function nameNode(row) {
  const node = element("span");
  node.append(element("a", row.method, { href: `#${row.id}` }));
  if (row.setting) node.append(" ", element("small", row.setting));
  return node;
}

function columnsOf() {
  const has = (name) => model().rows.some((row) => row[name] !== undefined);
  const others = model().columns.filter(({ key }) => key !== state.column);
  const times = (name) => (row) => (row[name] === undefined ? (row.bytes === undefined ? undefined : "not measured") : `${row[name].toFixed(2)} x`);
  return [
    { title: "method", data: "name", cellType: "th", type: "string", className: "words",
      render: (name, kind, row) => (kind === "display" ? nameNode(row) : name) },
    { ...numeric("sparsity", (row) => row.sparsity, (row) => row.order), className: "words" },
    { ...numeric(column().title, scoreText, (row) => row.value, scoreNode), hint: column().id },
    numeric("against dense", (row) => row.relative, (row) => row.value),
    numeric("zeros", (row) => (row.method === "dense" ? undefined : percent(row.zeros)), (row) => (row.method === "dense" ? undefined : row.zeros)),
    ...(has("size") ? [{ ...numeric("size", (row) => row.size && `${row.size.toFixed(3)} (${row.stored})`, (row) => row.size), hint: "bytes beside the dense model's in 16 bits, computed" }] : []),
    ...(has("bytes") ? [numeric("bytes", (row) => row.bytes && `${row.bytes.toFixed(3)} (${row.form})`, (row) => row.bytes)] : []),
    ...(has("bytes") ? ["decode", "prefill"].map((name) => numeric(name, times(name), (row) => row[name])) : []),
    numeric("prune", (row) => (row.seconds === undefined ? undefined : costText("seconds", row.seconds)), (row) => row.seconds),
    ...(has("recovery") ? [numeric("recover", (row) => (row.recovery === undefined ? undefined : duration(row.recovery)), (row) => row.recovery)] : []),
    numeric("seeds", (row) => row.seeds, (row) => row.seeds),
    ...others.map(({ key, title, id }) => {
      const score = (row) => ({ method: row.method, ...model().scores[key][row.id] });
      return { ...numeric(title, (row) => scoreText(score(row)), (row) => score(row).value, (row) => scoreNode(score(row))), hint: id };
    }),
  ];
}

function buildTable() {
  table?.destroy();
  rows = joined();
  const columns = columnsOf(), head = element("thead"), line = head.insertRow();
  line.append(...columns.map(({ title, hint = "", className }) => element("th", title, { scope: "col", class: className, title: hint })));
  const caption = element("caption", `Comparison of ${model().name}`, { class: "hidden" });
  $("table").replaceChildren(caption, head, element("tbody"));
  for (const settings of columns) {
    delete settings.title; // the heading is there, as text
    delete settings.hint;
    const { render } = settings;
    settings.render = (...words) => {
      const value = render(...words);
      return typeof value === "string" && words[1] === "display" ? document.createTextNode(value) : value;
    };
  }
  table = new DataTable("#table", {
    data: rows, columns, order: [], autoWidth: false, paging: rows.length > 100, pageLength: 50, lengthChange: false,
    layout: { topStart: null, topEnd: "search", bottomStart: rows.length > 100 ? "info" : null, bottomEnd: rows.length > 100 ? "paging" : null },
    language: { search: "Search", emptyTable: "no rows", zeroRecords: "no row is left: choose other filters" },
    createdRow: (line) => line.cells[0].setAttribute("scope", "row"),
  });
  for (const place of columns.keys()) {
    table.column(place).visible(place < columns.length - model().columns.length + 1 || $("all").checked, false);
  }
  document.querySelector("#first .note").textContent = model().note;
}

// ---------------------------------------------------------------- provenance

function showProvenance(shown) {
  const box = $("rows");
  if (box.dataset.model !== String(state.model)) {
    box.dataset.model = String(state.model);
    box.replaceChildren(...model().rows.map((row) => {
      const details = element("details", "", { class: "provenance", id: row.id });
      const summary = element("summary", `${row.name} `), count = model().runs[row.id]?.length ?? 0;
      summary.append(element("span", count ? `${count} result${count > 1 ? "s" : ""}` : "", { class: "muted" }));
      details.append(summary);
      details.addEventListener("toggle", () => details.children.length < 2 && fillProvenance(details, row));
      return details;
    }));
  }
  for (const details of box.children) details.hidden = !shown.has(details.id);
}

function fillProvenance(details, row) {
  const runs = model().runs[row.id] ?? [];
  if (!runs.length) details.append(element("p", "No run of its own: the dense model was scored in the runs of the other rows, under the same protocol."));
  for (const [id, seed, command, counted, date, spec, weights, scores, values, facts] of runs) {
    const section = element("section", "", { "aria-label": `Result ${id}` });
    const heading = element("h3", `seed ${seed} `);
    heading.append(element("code", id));
    if (!counted) heading.append(element("span", " repeated later: not counted", { class: "muted" }));
    const line = element("div", "", { class: "command" }), button = element("button", "Copy", { type: "button", class: "copy" });
    button.append(element("span", ` the command of ${id}`, { class: "hidden" }));
    line.append(element("code", command, { tabindex: "0" }), button);
    const list = element("dl");
    const lines = [["scores", scores.map((place, i) => `${page.texts[place]}: ${values[i]}`).join("; ")], ["date", date],
      ["spec hash", spec], ["hash of the scored weights", weights], ...facts.map((place, i) => [page.facts[i], page.texts[place]])];
    for (const [name, value] of lines) {
      if (!value) continue;
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      list.append(pair);
    }
    section.append(heading, line, list);
    details.append(section);
  }
}

function openRow(id) {
  for (const [place, { rows: list }] of page.models.entries()) {
    if (place !== state.model && list.some((row) => row.id === id)) { $("model").value = place; chooseModel(); }
  }
  const target = $(id);
  if (!target?.classList.contains("provenance")) return;
  $("provenance").open = true;
  target.hidden = false;
  target.open = true;
  target.scrollIntoView();
}

// Copying: by the clipboard where the browser allows it, else by selecting for the reader.
function select(node) {
  const range = document.createRange();
  range.selectNodeContents(node);
  const selection = window.getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
}

async function copy(button) {
  const code = button.parentNode.querySelector("code"), label = button.firstChild;
  let copied = false;
  try {
    await navigator.clipboard.writeText(code.textContent);
    copied = true;
  } catch { // no clipboard here, or not allowed
    select(code);
    copied = document.execCommand("copy");
  }
  if (!copied) select(code);
  label.textContent = copied ? "Copied" : "Selected: press Ctrl+C";
  $("copied").textContent = label.textContent;
  setTimeout(() => { label.textContent = "Copy"; }, 3000);
}

// ---------------------------------------------------------------- filters

function chips(box, values, chosen) {
  const legend = box.querySelector("legend");
  box.replaceChildren(legend, ...values.map(([value, text, color]) => {
    const label = element("label", "", { class: "chip" }), input = element("input", "", { type: "checkbox", value });
    input.checked = chosen.has(value);
    label.append(input, " ");
    if (color !== undefined) label.append(element("span", "", { class: "dot", style: `background: var(--s${color})` }));
    label.append(text);
    return label;
  }));
}

function chooseModel() {
  state.model = Number($("model").value);
  for (const finding of document.querySelectorAll(".finding")) finding.hidden = Number(finding.dataset.model) !== state.model;
  const { columns, rows: list, heat } = model();
  const select = $("column");
  select.replaceChildren(...columns.map(({ key, title, id }) => element("option", title, { value: key, title: id })));
  state.column = columns.some(({ key }) => key === state.column) ? state.column : model().column;
  select.value = state.column;
  const pruned = list.filter((row) => row.method !== "dense"), names = new Set(pruned.map((row) => row.method));
  state.methods = new Set([...state.methods].filter((name) => names.has(name)));
  const ratios = [...new Set(pruned.map((row) => row.sparsity))];
  state.sparsities = new Set([...state.sparsities].filter((name) => ratios.includes(name)));
  chips($("sparsities"), ratios.map((name) => [name, name]), state.sparsities);
  chips($("methods"), page.methods.map((name, place) => [name, name, place % 8]).filter(([name]) => names.has(name)), state.methods);
  $("all").parentNode.lastChild.textContent = ` all ${pruned.length} settings`;
  const known = Object.keys(page.against).filter((name) => name === "zeros" || list.some((row) => row[name] !== undefined));
  if (!known.includes(state.against)) state.against = "zeros";
  const against = $("against");
  against.hidden = known.length < 2;
  against.replaceChildren(against.querySelector("legend"), ...known.map((name) => {
    const label = element("label", "", { class: "chip" }), input = element("input", "", { type: "radio", name: "against", value: name });
    input.checked = name === state.against;
    label.append(input, ` ${page.against[name]}`);
    return label;
  }));
  if (heat) {
    $("run").replaceChildren(...heat.runs.map(({ name }, place) => element("option", name, { value: place })));
    $("run").value = heat.chosen;
    $("run-note").textContent = "Each run has its own color scale." + (heat.leftOut ? ` ${heat.leftOut} more rows are left out: select fewer rows to have them.` : "");
  }
  buildTable();
  update();
}

function update() {
  table.draw();
  const pruned = rows.filter((row) => row.method !== "dense"), shown = pruned.filter(passes);
  $("status").textContent = `${shown.length} of ${pruned.length} rows`;
  showCharts();
}

$("filters").addEventListener("change", ({ target }) => {
  if (target.id === "model") { chooseModel(); return; }
  if (target.id === "column") { state.column = target.value; buildTable(); }
  if (target.id === "all") buildTable();
  const chosen = { methods: state.methods, sparsities: state.sparsities }[target.closest("fieldset")?.id];
  if (chosen) chosen[target.checked ? "add" : "delete"](target.value);
  update();
});
$("filters").addEventListener("reset", (event) => {
  event.preventDefault();
  state.methods.clear();
  state.sparsities.clear();
  $("all").checked = false;
  table.search("");
  chooseModel();
});
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("against").addEventListener("change", ({ target }) => { state.against = target.value; showCharts(); });
$("run").addEventListener("change", showLayers);
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});
document.addEventListener("toggle", ({ target }) => { // toggle does not bubble, but it is captured
  if (target.matches?.("figure > details.data")) fillData(target.parentNode);
}, true);
dark.addEventListener("change", () => showCharts());
window.addEventListener("hashchange", () => openRow(location.hash.slice(1)));
window.addEventListener("beforeprint", () => { for (const figure of drawings.keys()) draw(figure); });

chooseModel();
openRow(location.hash.slice(1));
