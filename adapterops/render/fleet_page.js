(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const words = data.words;
const fateNames = {new: "new adapter", shared: "shared original", own: "own adapter",
                   base: "base model", none: "nothing"};
const collator = new Intl.Collator("en", {numeric: true});
const PRINTED = 1000;

// The same figures as in the page's text: three digits, and a bound for what is nearly zero.
const digits = (value) => Number(value.toPrecision(3));
function percent(value) {
  if (value === null || value === undefined) return "–";
  if (value > 0 && value < 1e-5) return "< 0.001\u202f%";
  return `${digits(100 * value)}\u202f%`;
}
function size(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${digits(value)}\u202f${units[unit]}`;
}
const number = (value) => value === null ? "–" : value.toLocaleString("en", {maximumSignificantDigits: 3});
const whole = (value) => value === null ? "–" : value.toLocaleString("en");
const word = (place) => place < 0 ? "" : words[place];

function element(name, properties = {}, ...children) {
  const found = Object.assign(document.createElement(name), properties);
  found.append(...children);
  return found;
}

// A path that may be broken behind its dots.
function broken(path) {
  const parts = path.split(".");
  return element("span", {}, ...parts.flatMap((part, place) =>
    place ? [".", document.createElement("wbr"), part] : [part]));
}

// ---- tables -------------------------------------------------------------------------------------

// A ratio of which most are 0 as a rule: those are to stand back.
function ratio(title, values) {
  return {title, value: (i) => values[i], down: true, show: (i) => values[i] === 0
    ? element("span", {className: "quiet", textContent: percent(0)}) : percent(values[i])};
}

// A column: its title, the value that it is sorted by, what a cell shows, its class; `down` where
// the first click sorts the largest to the top.
function tenantColumns(table) {
  const figure = (title, name) => ratio(title, table[name]);
  const why = (i) => word(table.reason[i]) === "shares" ? `shares a ${word(table.kind[i])}` : word(table.reason[i]);
  const columns = [
    {title: "Tenant", value: (i) => table.name[i], show: (i) => table.name[i], kind: "name"},
    {title: "Served by", value: (i) => word(table.by[i]), kind: "by", show: (i) => {
      const dot = element("i", {className: `fate-${table.fate[i]}`, title: fateNames[table.fate[i]]});
      const by = word(table.by[i]);
      if (!by) return element("span", {}, dot, fateNames[table.fate[i]]);
      const link = element("button", {type: "button", className: "name", textContent: by});
      link.addEventListener("click", () => listings.adapters.search(by));
      return element("span", {}, dot, link);
    }},
    figure("Error", "error"), figure("Missing", "missing"), figure("Foreign", "foreign"),
    {title: "Cosine", value: (i) => table.cosine[i], kind: "",
     show: (i) => table.cosine[i] === null ? "–" : String(Number(table.cosine[i].toFixed(4)))},
    figure("Worst", "worst_error"),
    {title: "in module", value: (i) => word(table.worst[i]), kind: "module",
     show: (i) => broken(word(table.worst[i]) || "–")},
    {title: "Why", value: why, show: why, kind: "words"},
  ];
  if (new Set(table.traffic).size > 1) {
    columns.push({title: "Traffic", value: (i) => table.traffic[i], show: (i) => number(table.traffic[i]), down: true});
  }
  if (table.measured) columns.splice(2, 0, figure("Error of outputs", "measured"));
  return columns;
}

function adapterColumns(table) {
  const figure = (title, name) => ratio(title, table[name]);
  const uniform = table.traffic.every((traffic, i) => traffic === table.members[i]);
  const columns = [
    {title: "Adapter", value: (i) => word(table.id[i]), show: (i) => word(table.id[i]), kind: "name"},
    {title: "Kind", value: (i) => word(table.kind[i]), show: (i) => word(table.kind[i]), kind: "words"},
    {title: "Tenants", value: (i) => table.members[i], down: true, show: (i) => {
      const link = element("button", {type: "button", textContent: whole(table.members[i]),
        ariaLabel: `${whole(table.members[i])}, show them`});
      link.addEventListener("click", () => listings.tenants.search(word(table.id[i])));
      return link;
    }},
    {title: "Traffic", value: (i) => table.traffic[i], show: (i) => number(table.traffic[i]), down: true},
    {title: "Rank", value: (i) => table.rank[i], show: (i) => whole(table.rank[i]), down: true},
    {title: "Size", value: (i) => table.size[i], show: (i) => size(table.size[i]), down: true},
    figure("Largest error", "error"), figure("Foreign", "foreign"),
    {title: "No less than", value: (i) => table.bound[i], show: (i) => percent(table.bound[i]), down: true},
  ];
  return uniform ? columns.filter((column) => column.title !== "Traffic") : columns;
}

function listing(root, name, table, columns, options) {
  const count = table[options.key].length;
  const texts = Array.from({length: count}, (_, i) => options.text(table, i).toLowerCase());
  const state = {sort: options.sort, down: true, page: 0, query: "", kind: ""};
  let order = [];

  const input = element("input", {type: "search", placeholder: options.hint, autocomplete: "off",
                                  spellcheck: false, ariaLabel: `Search ${name}`});
  const select = element("select", {ariaLabel: options.filter},
    element("option", {value: "", textContent: options.every}),
    ...options.kinds(table).map(([value, said]) => element("option", {value, textContent: said})));
  const found = element("span", {className: "quiet", id: `found-${name}`});
  found.setAttribute("aria-live", "polite");
  const heads = columns.map((column, place) => {
    const button = element("button", {type: "button", textContent: column.title});
    button.addEventListener("click", () => {
      state.down = state.sort === place ? !state.down : Boolean(column.down);
      state.sort = place;
      state.page = 0;
      arrange();
    });
    return element("th", {scope: "col", className: column.kind ? "words" : ""}, button);
  });
  const body = element("tbody");
  const before = element("button", {type: "button", textContent: "Previous"});
  const after = element("button", {type: "button", textContent: "Next"});
  const where = element("span");
  const turn = (by) => { state.page += by; draw(); root.scrollIntoView({block: "start"}); };
  before.addEventListener("click", () => turn(-1));
  after.addEventListener("click", () => turn(1));
  const pages = element("div", {className: "pages"}, before, after, where);
  const scroll = element("div", {className: "scroll", tabIndex: 0, ariaLabel: `Table of ${name}`},
    element("table", {}, element("caption", {textContent: options.caption}),
      element("thead", {}, element("tr", {}, ...heads)), body));
  scroll.setAttribute("role", "region");
  root.append(element("div", {className: "tools"}, input, select, found), scroll, pages);

  function arrange() {
    const parts = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    order = [];
    for (let i = 0; i < count; i += 1) {
      if (state.kind && options.kind(table, i) !== state.kind) continue;
      if (parts.every((part) => texts[i].includes(part))) order.push(i);
    }
    const value = columns[state.sort].value;
    const sign = state.down ? -1 : 1;
    order.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === y || (x === null && y === null)) return a - b;
      if (x === null) return 1;
      if (y === null) return -1;
      const difference = typeof x === "string" ? collator.compare(x, y) : x - y;
      return sign * difference || a - b;
    });
    heads.forEach((head, place) => {
      if (place === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    draw();
  }

  function draw(first = state.page * options.rows, rows = options.rows) {
    const last = Math.min(first + rows, order.length);
    const lines = [];
    for (const i of order.slice(first, last)) {
      lines.push(element("tr", {}, ...columns.map((column) =>
        element("td", {className: column.kind || ""}, column.show(i)))));
      if (!options.below) continue;
      lines.at(-1).className = "over";
      lines.push(element("tr", {className: "below"},
        element("td", {colSpan: columns.length}, element("span", {textContent: options.below(table, i)}))));
    }
    body.replaceChildren(...lines);
    found.textContent = order.length === count
      ? `${whole(count)} ${name}` : `${whole(order.length)} of ${whole(count)} ${name}`;
    where.textContent = order.length ? `${whole(first + 1)} to ${whole(last)} of ${whole(order.length)}` : "nothing found";
    before.disabled = first === 0;
    after.disabled = last >= order.length;
    pages.hidden = order.length > 0 && order.length <= options.rows;
  }

  function search(query) {
    input.value = query;
    Object.assign(state, {query, kind: "", page: 0});
    select.value = "";
    arrange();
    input.focus({preventScroll: true});
    root.parentElement.scrollIntoView({block: "start"});
  }

  input.addEventListener("input", () => { Object.assign(state, {query: input.value, page: 0}); arrange(); });
  select.addEventListener("change", () => { Object.assign(state, {kind: select.value, page: 0}); arrange(); });
  window.addEventListener("beforeprint", () => draw(0, PRINTED));
  window.addEventListener("afterprint", () => draw());
  arrange();
  return {search};
}

const kindsOf = (values) => [...new Set(values)].sort();
const listings = {};
listings.adapters = listing(document.querySelector('[data-table="adapters"]'), "adapters",
  data.adapters, adapterColumns(data.adapters), {
    key: "id", rows: 12, sort: 2, caption: "Adapters that are deployed",
    hint: "Search id, reason, path", filter: "Kind", every: "all kinds",
    text: (table, i) => [word(table.id[i]), word(table.kind[i]), word(table.reason[i]), table.only[i], table.path[i]].join(" "),
    kind: (table, i) => word(table.kind[i]),
    below: (table, i) => [table.only[i], word(table.reason[i])].filter(Boolean).join(": "),
    kinds: (table) => kindsOf(table.kind.map(word)).map((kind) => [kind, kind]),
  });
listings.tenants = listing(document.querySelector('[data-table="tenants"]'), "tenants",
  data.tenants, tenantColumns(data.tenants), {
    key: "name", rows: 50, sort: 2, caption: "Tenants, what serves them and their errors",
    hint: "Search tenant, adapter, module, reason", filter: "Served by", every: "served by anything",
    text: (table, i) => [table.name[i], word(table.by[i]), word(table.worst[i]), word(table.kind[i]), word(table.reason[i])].join(" "),
    kind: (table, i) => table.fate[i],
    kinds: (table) => Object.entries(fateNames).filter(([fate]) => table.fate.includes(fate)),
  });

const repaint = data.map ? similarityMap(data.map, element) : () => {};
repaint();

// ---- light and dark -----------------------------------------------------------------------------

const scheme = document.getElementById("scheme");
const system = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.scheme || (system.matches ? "dark" : "light")) === "dark";
function renew() {
  scheme.textContent = isDark() ? "Light" : "Dark";
  scheme.ariaLabel = `${scheme.textContent} colours`;
  repaint();
}
scheme.hidden = false;
scheme.addEventListener("click", () => {
  document.documentElement.dataset.scheme = isDark() ? "light" : "dark";
  renew();
});
system.addEventListener("change", renew);
renew();
})();
