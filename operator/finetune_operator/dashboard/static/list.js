// The jobs: a table that is sorted, filtered, and kept up to date in place.

import { h, keep, put } from "./dom.js";
import { count, duration, modelName, number } from "./format.js";
import { ago, chip, progressBar } from "./parts.js";

const PHASES = ["Running", "Starting", "Queued", "Pending", "Restarting", "Suspended", "Failed", "Succeeded"];
const FIRST = 300;

const COLUMNS = [
  { name: "Job", sort: (job) => job.name },
  { name: "Phase", sort: (job) => PHASES.indexOf(job.phase) },
  { name: "Progress", sort: (job) => job.progress.percent ?? -1 },
  {
    name: "Left",
    sort: (job) => (job.phase === "Running" ? (job.progress.estimatedRemainingSeconds ?? Infinity) : Infinity),
    number: true,
  },
  { name: "Loss", sort: (job) => job.progress.loss ?? Infinity, number: true },
  { name: "Tokens/s", sort: (job) => job.progress.tokensPerSecond ?? -1, number: true },
  { name: "Method", sort: (job) => job.method },
  { name: "Model", sort: (job) => modelName(job.model) },
  { name: "GPUs", sort: (job) => job.gpus, number: true },
  { name: "Attempt", sort: (job) => job.attempt, number: true },
  { name: "Age", sort: (job) => -Date.parse(job.createdAt), number: true },
];

/** The page, and how it takes in a new list. */
export function listPage(about) {
  let jobs = [];
  let total = 0;
  let phase = "";
  let most = FIRST;
  let sorted = { column: COLUMNS.length - 1, down: false };
  const rows = new Map();

  const phases = h("div", { class: "phases", role: "group", "aria-label": "Filter by phase" });
  const search = h("input", {
    id: "search",
    type: "search",
    placeholder: "Filter by name, model, method …  /",
    "aria-label": "Filter jobs",
    autocomplete: "off",
    spellcheck: "false",
    oninput: draw,
  });
  const shown = h("span", { class: "dim", role: "status" });
  const body = h("tbody");
  const empty = h("p", { class: "empty", hidden: true });
  const more = h(
    "button",
    {
      type: "button",
      hidden: true,
      onclick: () => {
        most = Infinity;
        draw();
      },
    },
    "Show all",
  );
  const headers = COLUMNS.map((column, index) =>
    h(
      "th",
      { scope: "col", class: column.number ? "number" : null },
      h(
        "button",
        {
          type: "button",
          onclick: () => {
            sorted = { column: index, down: sorted.column === index && !sorted.down };
            draw();
          },
        },
        column.name,
      ),
    ),
  );
  const things = about?.kind === "runs" ? "runs" : "jobs";
  const group = about?.kind === "runs" ? "run" : "namespace";

  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = jobs
      .filter((job) => !phase || job.phase === phase)
      .filter((job) =>
        words.every((word) =>
          `${job.namespace}/${job.name} ${job.model} ${job.method} ${job.queue} ${job.reason}`
            .toLowerCase()
            .includes(word),
        ),
      );
    const key = COLUMNS[sorted.column].sort;
    const sign = sorted.down ? -1 : 1;
    found.sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      return (
        sign * (typeof left === "string" ? left.localeCompare(right) : (left > right) - (left < right)) ||
        a.name.localeCompare(b.name)
      );
    });
    headers.forEach((header, index) =>
      header.setAttribute("aria-sort", index !== sorted.column ? "none" : sorted.down ? "descending" : "ascending"),
    );
    place(found.slice(0, most));
    more.hidden = found.length <= most;
    put(more, `Show all ${count(found.length)}`);
    put(
      shown,
      found.length === jobs.length && total === jobs.length
        ? `${count(total)} ${things}`
        : `${count(found.length)} of ${count(total)} ${things}`,
    );
    empty.hidden = found.length > 0;
    put(
      empty,
      jobs.length
        ? "No job matches."
        : about?.kind === "runs"
          ? "No runs in this folder yet. finetune run JOB.yaml makes one."
          : "No FineTuneJobs here that you may see. “New job” builds a manifest for one.",
    );
    keep(phases, [phase, PHASES.map((name) => jobs.filter((job) => job.phase === name).length)], () =>
      PHASES.map(phaseButton),
    );
  }

  function phaseButton(name) {
    const many = jobs.filter((job) => job.phase === name).length;
    const toggle = () => {
      phase = phase === name ? "" : name;
      draw();
      phases.querySelector(`[data-phase="${name}"]`)?.focus();
    };
    return h(
      "button",
      {
        type: "button",
        "data-phase": name,
        "aria-pressed": String(phase === name),
        class: many ? null : "none",
        onclick: toggle,
      },
      h("b", {}, count(many)),
      " ",
      h("span", {}, name),
    );
  }

  function place(found) {
    const wanted = found.map((job) => {
      const key = `${job.namespace}/${job.name}`;
      const row = rows.get(key) ?? makeRow(job, group);
      rows.set(key, row);
      row.update(job);
      return row.element;
    });
    const gone = new Set(rows.keys());
    for (const job of found) gone.delete(`${job.namespace}/${job.name}`);
    for (const key of gone) {
      rows.get(key).element.remove();
      rows.delete(key);
    }
    // Moved only where the order changed: a row that is focused keeps its focus.
    wanted.forEach((element, index) => {
      if (body.children[index] !== element) body.insertBefore(element, body.children[index] ?? null);
    });
  }

  body.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    const links = [...body.querySelectorAll("a")];
    const next = links[links.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1)];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });

  const element = h(
    "div",
    { class: "page" },
    h("div", { class: "tools" }, h("h1", {}, about?.kind === "runs" ? "Runs" : "Jobs"), phases, search, shown),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of jobs" },
      h("table", { class: "jobs" }, h("thead", {}, h("tr", {}, headers)), body),
    ),
    empty,
    more,
  );
  const update = (data) => {
    jobs = data.jobs;
    total = data.total;
    draw();
  };
  return { element, update };
}

function makeRow(job, group) {
  const cell = (kind = null) => h("td", { class: kind });
  const link = h("a", { href: `#/jobs/${encodeURIComponent(job.namespace)}/${encodeURIComponent(job.name)}` });
  const where = h("span", { class: "dim", title: group });
  const [phase, progress] = [cell(), cell("progress")];
  const [left, loss, speed, method, model, gpus, attempt, since] = [
    "number",
    "number",
    "number",
    null,
    "model",
    "number",
    "number",
    "number",
  ].map(cell);
  const element = h(
    "tr",
    {},
    h("td", { class: "job" }, link, where),
    phase,
    progress,
    left,
    loss,
    speed,
    method,
    model,
    gpus,
    attempt,
    since,
  );
  const update = (now) => {
    put(link, now.name);
    put(where, now.namespace);
    keep(phase, [now.phase, now.deleting, now.reason], ([name, deleting, reason]) =>
      chip(deleting ? "Deleting" : name, reason),
    );
    keep(
      progress,
      [now.progress.percent, now.phase, now.progress.step, now.progress.totalSteps],
      ([percent, name, step, of]) => progressBar(percent, name, step, of),
    );
    put(left, now.phase === "Running" ? duration(now.progress.estimatedRemainingSeconds) : "–");
    put(loss, number(now.progress.loss));
    put(speed, now.phase === "Running" ? count(now.progress.tokensPerSecond) : "–");
    put(method, now.method);
    put(model, modelName(now.model));
    model.title = now.model;
    put(gpus, now.gpus === 0 ? "CPU" : String(now.gpus));
    put(attempt, now.attempt ? String(now.attempt) : "–");
    keep(since, now.createdAt, ago);
  };
  return { element, update };
}
