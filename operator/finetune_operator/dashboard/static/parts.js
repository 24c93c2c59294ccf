// Small parts that several pages have.

import { h, put, s } from "./dom.js";
import { age, bytes, clock, count, share, short } from "./format.js";

const SHAPES = {
  Succeeded: "M3.5 8.5l3 3 6-7",
  Failed: "M4 4l8 8M12 4l-8 8",
  Running: "M5 3.5v9l7.5-4.5z",
  Suspended: "M5.5 4v8M10.5 4v8",
  Restarting: "M12.5 8a4.5 4.5 0 1 1-1.6-3.4M12.5 2.5v3h-3",
};
const WAITING = "M8 2.5a5.5 5.5 0 1 1-.01 0M8 5v3.3l2.2 1.3";

/** A phase, told by word, shape and colour. */
export function chip(phase, why = "") {
  return h(
    "span",
    { class: "chip", "data-phase": phase, title: why || null },
    s("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, s("path", { d: SHAPES[phase] ?? WAITING })),
    phase,
  );
}

/** How long ago something was. */
export function ago(time) {
  return h("time", { datetime: time, title: clock(time), "data-ago": true }, age(time));
}

/** Time goes on for a page that is otherwise as it was. */
export function refreshTimes(root) {
  for (const one of root.querySelectorAll("time[data-ago]")) put(one, age(one.dateTime));
}

/** A bar with its number. */
export function progressBar(percent, phase, step, of) {
  const known = typeof percent === "number";
  const bar = s(
    "svg",
    {
      class: "bar",
      "data-phase": phase,
      viewBox: "0 0 100 6",
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": known ? `${percent} percent` : "no progress yet",
    },
    s("rect", { class: "all", width: 100, height: 6 }),
    s("rect", { class: "done", width: known ? Math.max(0, Math.min(100, percent)) : 0, height: 6 }),
  );
  return [
    bar,
    h(
      "span",
      { class: "number", title: of ? `step ${count(step)} of ${count(of)}` : null },
      known ? `${percent} %` : "–",
    ),
  ];
}

const PARTS = ["weights", "gradients", "optimizer", "activations", "logits", "overhead"];

/** Memory of one GPU in parts, against what the GPU has. */
export function memoryBar(memory, limit) {
  if (!memory) return h("p", { class: "dim" }, "Not known: the model's configuration could not be read.");
  const whole = Math.max(limit ?? 0, memory.total, 1);
  const label = PARTS.map((part) => `${part} ${bytes(memory[part] ?? 0)}`).join(", ");
  const bar = s(
    "svg",
    {
      class: "stack",
      viewBox: "0 0 1000 26",
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `Memory: ${label}; ${bytes(memory.total)} in all${limit ? ` of ${bytes(limit)}` : ""}`,
    },
    s("rect", { class: "all", width: 1000, height: 26 }),
  );
  let at = 0;
  for (const part of PARTS) {
    const width = ((memory[part] ?? 0) / whole) * 1000;
    if (width > 0)
      bar.append(
        s(
          "rect",
          { class: "part", "data-part": part, x: at, width: Math.max(0, width - 1.5), height: 26 },
          s("title", {}, `${part}: ${bytes(memory[part])}`),
        ),
      );
    at += width;
  }
  if (limit) bar.append(s("rect", { class: "limit", x: (limit / whole) * 1000 - 2, width: 2, height: 26 }));
  const over = limit && memory.total > limit;
  const rows = PARTS.map((part) =>
    h(
      "li",
      { class: memory[part] ? null : "none" },
      h("i", { "data-part": part }),
      h("span", {}, part),
      h("b", {}, bytes(memory[part] ?? 0)),
    ),
  );
  return [
    h(
      "p",
      { class: "sum" },
      h("b", {}, bytes(memory.total)),
      limit ? ` of ${bytes(limit)} on each GPU (${share(memory.total / limit)})` : " on each",
      over ? h("b", { class: "bad" }, "  does not fit") : "",
    ),
    bar,
    h("ul", { class: "legend" }, rows),
  ];
}

/** Pairs of a word and what it is; those that are not known are left out. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== "–");
  return h(
    "dl",
    { class: "facts" },
    known.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** What the planner decided. */
export function planFacts(plan, spec) {
  const processes = plan.nodes * Math.max(1, plan.gpusPerNode);
  const trained = plan.trainableParameters;
  const recomputed = plan.gradientCheckpointing
    ? plan.recomputedBlocks
      ? `lowest ${plan.recomputedBlocks} blocks`
      : "all blocks"
    : "off";
  const offloaded = [
    plan.offloadOptimizer && "optimizer",
    plan.offloadParameters && "parameters",
    plan.offloadActivations && "activations",
  ]
    .filter(Boolean)
    .join(", ");
  return facts([
    [
      "Pods",
      `${plan.nodes} × ${plan.gpusPerNode ? `${plan.gpusPerNode} GPU${plan.gpusPerNode > 1 ? "s" : ""}` : "CPU"}`,
    ],
    ["Strategy", plan.zeroStage ? `ZeRO-${plan.zeroStage}` : plan.strategy],
    [
      "Batch",
      `${count(spec?.training?.batchSize ?? plan.microBatchSize * plan.gradientAccumulation * processes)} = ${plan.microBatchSize} rows × ${plan.gradientAccumulation} passes × ${processes}`,
    ],
    ["Checkpointing", recomputed],
    ["Offloaded", offloaded],
    [
      "Trained",
      trained ? `${short(trained)} of ${short(plan.totalParameters)} (${share(trained / plan.totalParameters)})` : "",
    ],
  ]);
}

/** A titled part of a page. */
export function section(title, ...children) {
  const id = `part-${title.toLowerCase().replace(/\W+/g, "-")}`;
  return h("section", { class: "part", "aria-labelledby": id }, h("h2", { id }, title), children);
}

const LONG = new Set(["Message", "Metrics", "What and why"]);

/** A table of texts; what may be long is wrapped, the rest stays in one line. */
export function table(label, columns, rows) {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": `${label}: table` },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((cell, index) => h("td", { class: LONG.has(columns[index]) ? "long" : null }, cell)),
          ),
        ),
      ),
    ),
  );
}
