// One job: how far it is, its curves, its plan, its attempts, what it left.

import { chart } from "./chart.js";
import { h, keep, put, say } from "./dom.js";
import { clock, count, duration, modelName, number, since } from "./format.js";
import { ago, chip, facts, memoryBar, planFacts, progressBar, section, table } from "./parts.js";
import { answers, evaluation } from "./result.js";

const BAD = new Set(["Failed", "Stalled"]);

/** The page, and how it takes in what is new. */
export function jobPage(about, namespace, name) {
  let phase = null;
  const slots = Object.fromEntries(
    ["head", "tiles", "plan", "attempts", "conditions", "evaluation", "answers", "events", "spec"].map((slot) => [
      slot,
      h("div", { class: "slot" }),
    ]),
  );
  const charts = {
    loss: chart({ title: "Loss", names: ["training", "held-out"] }),
    norm: chart({ title: "Gradient norm", names: ["norm"] }),
    speed: chart({ title: "Tokens per second", names: ["tokens/s"], format: (value) => count(value), log: false }),
    rate: chart({
      title: "Learning rate",
      names: ["rate"],
      format: (value) => (value === 0 ? "0" : value.toExponential(1)),
    }),
  };
  const from = h(
    "p",
    { class: "dim hint" },
    {
      operator:
        "Curves begin when the replica that leads began to lead; they are kept in its memory alone, thinned so that peaks stay.",
      kubeconfig: "Curves begin when this page's server first saw the job: a cluster keeps only the newest value.",
      runs: "Curves are read from what the trainer wrote for TensorBoard.",
    }[about?.kind] ?? "",
  );

  const grid = h(
    "div",
    { class: "charts" },
    Object.values(charts).map((one) => one.element),
  );
  const nothing = h("p", { class: "dim" }, "Nothing reported yet.");
  const element = h(
    "div",
    { class: "page job" },
    slots.head,
    slots.tiles,
    section("Curves", grid, nothing, from),
    h(
      "div",
      { class: "columns" },
      h("div", {}, slots.plan, slots.attempts, slots.conditions),
      h("div", {}, slots.evaluation, slots.answers, slots.events, slots.spec),
    ),
  );

  function update(job) {
    if (phase !== null && phase !== job.phase) say(`${name} is ${job.phase}`);
    phase = job.phase;
    head(slots.head, job);
    keep(slots.tiles, [job.progress, job.phase], () => tiles(job));
    const curves = job.curves;
    nothing.hidden = Object.keys(curves).length > 0;
    grid.hidden = !nothing.hidden;
    charts.loss.update([curves.loss ?? [], curves.eval_loss ?? []]);
    charts.norm.update([curves.grad_norm ?? []]);
    charts.speed.update([curves.tokens_per_second ?? []]);
    charts.rate.update([curves.learning_rate ?? []]);
    keep(slots.plan, [job.plan, job.gpuMemory, job.spec], () => plan(job));
    keep(slots.attempts, [job.attempts, job.failures, job.pods], () => attempts(job));
    keep(slots.conditions, job.conditions, () => conditions(job));
    keep(slots.evaluation, job.result, () => evaluation(job));
    keep(slots.answers, job.answers, () => answers(job));
    keep(slots.events, job.events, () => events(job));
    keep(slots.spec, [job.spec, job.uid, job.generation], () => spec(job));
  }
  return { element, update };
}

function head(slot, job) {
  keep(
    slot,
    [
      job.name,
      job.namespace,
      job.phase,
      job.deleting,
      job.message,
      job.reason,
      job.note,
      job.model,
      job.method,
      job.startTime,
      job.completionTime,
    ],
    () => [
      h(
        "div",
        { class: "title" },
        h(
          "nav",
          { "aria-label": "Up" },
          h("a", { href: "#/" }, "Jobs"),
          h("span", { class: "dim" }, " / ", job.namespace, " /"),
        ),
        h("h1", {}, job.name),
        chip(job.deleting ? "Deleting" : job.phase),
        h(
          "a",
          { class: "button", href: `#/new/${encodeURIComponent(job.namespace)}/${encodeURIComponent(job.name)}` },
          "Use as template",
        ),
      ),
      h("p", { class: "why" }, h("b", {}, job.reason), job.reason && job.message ? ": " : "", job.message),
      job.note ? h("p", { class: "why warn" }, job.note) : "",
      facts([
        ["Model", modelName(job.model)],
        ["Method", job.method],
        ["GPUs", job.gpus === 0 ? "CPU" : String(job.gpus)],
        ["Queue", job.queue],
        ["Created", h("time", { datetime: job.createdAt }, clock(job.createdAt))],
        ["Started", job.startTime ? h("time", { datetime: job.startTime }, clock(job.startTime)) : ""],
        ["Took", job.startTime && job.completionTime ? duration(since(job.startTime) - since(job.completionTime)) : ""],
      ]),
    ],
  );
}

function tiles(job) {
  const now = job.progress;
  const tile = (label, value, more = "") =>
    h("div", { class: "tile" }, h("span", {}, label), h("b", {}, value), h("small", {}, more));
  return h(
    "div",
    { class: "tiles" },
    h(
      "div",
      { class: "tile wide" },
      h("span", {}, "Progress"),
      h("div", { class: "meter" }, progressBar(now.percent, job.phase, now.step, now.totalSteps)),
      h("small", {}, now.totalSteps ? `step ${count(now.step)} of ${count(now.totalSteps)}` : ""),
    ),
    tile(
      "Left",
      job.phase === "Running" ? duration(now.estimatedRemainingSeconds) : "–",
      now.updatedAt && job.phase === "Running" ? `reported ${clock(now.updatedAt).slice(11)}` : "",
    ),
    tile("Loss", number(now.loss), now.evalLoss === undefined ? "" : `held-out ${number(now.evalLoss)}`),
    tile("Gradient norm", number(now.gradNorm)),
    tile("Tokens/s", count(now.tokensPerSecond)),
    tile("Learning rate", typeof now.learningRate === "number" ? now.learningRate.toExponential(2) : "–"),
    tile("Epoch", number(now.epoch, 3)),
  );
}

function plan(job) {
  if (!job.plan) return section("Plan", h("p", { class: "dim" }, "Not planned yet."));
  const cpu = !job.plan.gpusPerNode;
  return section(
    "Plan",
    planFacts(job.plan, job.spec),
    cpu && !job.plan.memoryPerGPU ? "" : memoryBar(job.plan.memoryPerGPU, cpu ? null : job.gpuMemory),
  );
}

function attempts(job) {
  const now = job.attempts;
  if (!now.current && !job.failures.length) return section("Attempts", h("p", { class: "dim" }, "None yet."));
  const rows = job.failures.map((one) => [
    String(one.attempt || "–"),
    clock(one.at),
    h("b", {}, one.reason),
    [
      h("span", {}, one.message),
      h(
        "small",
        { class: "dim block" },
        [one.pod, one.exit_code === null ? "" : `exit code ${one.exit_code}`].filter(Boolean).join(", "),
      ),
    ],
  ]);
  const pods = job.pods.map((pod) => [
    pod.name,
    String(pod.attempt),
    pod.phase + (pod.reason ? ` (${pod.reason})` : ""),
    pod.node || "–",
  ]);
  return section(
    "Attempts",
    facts([
      ["Newest", String(now.current ?? 0)],
      ["After infrastructure failures", count(now.retries ?? 0)],
      ["After preemptions", count(now.preemptions ?? 0)],
      ["With a smaller micro-batch", now.memoryRetries ? count(now.memoryRetries) : ""],
      ["Next at", now.nextAttemptAt ? clock(now.nextAttemptAt) : ""],
    ]),
    rows.length
      ? table("Failed attempts", ["Attempt", "Ended", "Reason", "What and why"], rows)
      : h("p", { class: "dim" }, "None has failed."),
    pods.length ? table("Pods", ["Pod", "Attempt", "Phase", "Node"], pods) : "",
  );
}

function conditions(job) {
  if (!job.conditions.length) return section("Conditions", h("p", { class: "dim" }, "None yet."));
  const rows = job.conditions.map((one) => [
    h("span", { class: "condition", "data-status": one.status, "data-bad": BAD.has(one.type) }, one.type),
    one.status,
    one.reason,
    one.message ?? "",
    clock(one.lastTransitionTime),
  ]);
  return section("Conditions", table("Conditions", ["Condition", "Holds", "Reason", "Message", "Since"], rows));
}

function events(job) {
  if (!job.events.length) return section("Events", h("p", { class: "dim" }, "None that are remembered."));
  const rows = job.events
    .toReversed()
    .map((one) => [
      [ago(one.at), " ago"],
      h("span", { class: "event", "data-type": one.type }, one.type),
      h("b", {}, one.reason),
      one.message,
    ]);
  return section("Events", table("Events", ["When", "Type", "Reason", "Message"], rows));
}

function spec(job) {
  const text = h("pre", { tabindex: "0", "aria-label": "Spec" });
  put(text, JSON.stringify(job.spec, null, 2));
  return section("Spec", h("details", {}, h("summary", {}, `generation ${job.generation}, uid ${job.uid}`), text));
}
