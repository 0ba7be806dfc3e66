"use strict";
const MOST = 200;  // rows of a search that are shown

// --- texts: the chunk under the pointer or the focus, and its partner

for (const article of document.querySelectorAll(".aligned")) {
  const said = article.querySelector(".said");
  const chunks = [...article.querySelectorAll(".chunk")];
  const texts = (chunk) => [...chunk.children].map((token) => `“${token.textContent}”`).join(" ");
  const light = (chunk) => {
    const number = chunk?.dataset.chunk;
    const lit = chunks.filter((one) => one.dataset.chunk === number);
    for (const one of chunks) one.classList.toggle("lit", lit.includes(one));
    said.textContent = lit.map(texts).join("  =  ");
  };
  const focus = (chunk) => {
    for (const one of chunks) if (one.parentNode === chunk.parentNode) one.tabIndex = one === chunk ? 0 : -1;
    chunk.focus();
  };
  article.addEventListener("pointerover", (event) => light(event.target.closest(".chunk")));
  article.addEventListener("pointerleave", () => light(null));
  article.addEventListener("focusin", (event) => light(event.target.closest(".chunk")));
  article.addEventListener("focusout", () => light(null));
  article.addEventListener("keydown", (event) => {
    const chunk = event.target.closest(".chunk");
    if (!chunk) return;
    const row = chunks.filter((one) => one.parentNode === chunk.parentNode);
    const place = row.indexOf(chunk);
    const other = chunks.find((one) => one.dataset.chunk === chunk.dataset.chunk && one.parentNode !== chunk.parentNode);
    const next = {
      ArrowLeft: row[place - 1], ArrowRight: row[place + 1], Home: row[0], End: row[row.length - 1],
      ArrowUp: other, ArrowDown: other,
    }[event.key];
    if (next) {
      event.preventDefault();
      focus(next);
    }
  });
}

// --- the rows of W

const query = document.getElementById("query");
const found = document.getElementById("found");
const hits = document.getElementById("hits");
const visible = (text) => text.replaceAll(" ", "·") || "∅";

const made = (name, content, type) => {
  const element = document.createElement(name);
  element.append(...[content].flat());
  if (type) element.className = type;
  return element;
};
const token = (text) => made("span", visible(text), "token");

async function load() {
  const text = document.getElementById("tables").textContent;
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const tables = await new Response(stream).json();
  tables.start = new Uint32Array(tables.pattern.length + 1);
  tables.pattern.forEach((pattern, row) => {
    tables.start[row + 1] = tables.start[row] + tables.patterns[pattern].length;
  });
  tables.isReached = new Uint8Array(tables.teacher.length);
  for (const column of tables.columns) tables.isReached[column] = 1;
  return tables;
}

// Ids of the tokens that match, whole texts first, a space before them apart.
function matching(texts, wanted, isMeant) {
  if (/^#\d+$/.test(wanted)) return [Number(wanted.slice(1))].filter((id) => id < texts.length && isMeant(id));
  const ranked = [[], [], [], []];
  texts.forEach((text, id) => {
    if (!isMeant(id) || !text.includes(wanted)) return;
    ranked[text === wanted ? 0 : text.trimStart() === wanted ? 1 : text.trimStart().startsWith(wanted) ? 2 : 3].push(id);
  });
  return ranked.flat();
}

function row(tables, id) {
  const weights = tables.patterns[tables.pattern[id]];
  const pieces = weights.map((weight, k) => [weight, tables.columns[tables.start[id] + k]]);
  pieces.sort((one, other) => other[0] - one[0]);
  const becomes = pieces.flatMap(([weight, column]) => [token(tables.teacher[column]), ` ${weight}  `]);
  return made("tr", [made("td", String(id), "number"), made("td", token(tables.student[id])),
    made("td", becomes.length ? becomes : "nothing"), made("td", tables.kinds[tables.kind[id]], "mark")]);
}

function search(tables) {
  const what = document.querySelector("input[name=what]:checked").value;
  const wanted = query.value;
  let rows, ids;
  if (what === "unreached") {
    ids = matching(tables.teacher, wanted, (id) => tables.is_text[id] && !tables.isReached[id]);
    rows = (id) => made("tr", [made("td", String(id), "number"), made("td", token(tables.teacher[id])),
      made("td", ""), made("td", "teacher's", "mark")]);
  } else if (what === "teacher") {
    const order = new Map((wanted ? matching(tables.teacher, wanted, () => true) : []).map((id, place) => [id, place]));
    const first = new Map();
    for (let id = 0; order.size && id < tables.student.length; id++) {
      for (let k = tables.start[id]; k < tables.start[id + 1]; k++) {
        const place = order.get(tables.columns[k]);
        if (place !== undefined) first.set(id, Math.min(place, first.get(id) ?? Infinity));
      }
    }
    ids = [...first.keys()].sort((one, other) => first.get(one) - first.get(other) || one - other);
    rows = (id) => row(tables, id);
  } else {
    ids = wanted ? matching(tables.student, wanted, () => true) : [];
    rows = (id) => row(tables, id);
  }
  hits.replaceChildren(...ids.slice(0, MOST).map(rows));
  const count = ids.length.toLocaleString("en");
  found.textContent = !wanted && what !== "unreached" ? ""
    : ids.length > MOST ? `${count} rows, the first ${MOST} of them below` : ids.length === 1 ? "1 row" : `${count} rows`;
}

if (typeof DecompressionStream === "undefined") {
  found.textContent = "The search needs a browser of 2023 or later.";
} else {
  load().then((tables) => {
    const again = () => search(tables);
    document.getElementById("search").addEventListener("submit", (event) => event.preventDefault());
    document.getElementById("search").addEventListener("input", again);
    again();
    document.body.dataset.ready = "true";
  });
}
