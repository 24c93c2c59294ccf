// What a job left: metrics before and after, files, sample answers.

import { h } from "./dom.js";
import { bytes, count, number, share } from "./format.js";
import { facts, section, table } from "./parts.js";

/** Of these, which may be negative or nothing at first, the difference is told, and not a share. */
const DIFFERENCES = new Set(["rewardMargin", "pearson", "spearman"]);
const LOWER_IS_BETTER = new Set(["perplexity", "loss", "mse", "mae", "rmse"]);

/** Metrics before and after, and where the result is. */
export function evaluation(job) {
  const found = job.result;
  if (!found) return section("Result", h("p", { class: "dim" }, "None yet. Evaluation comes at the end."));
  const { base, tuned } = found.evaluation ?? {};
  const names = [...new Set([...Object.keys(tuned ?? {}), ...Object.keys(base ?? {})])];
  const rows = names.map((name) => [
    name,
    number(base?.[name]),
    number(tuned?.[name]),
    change(name, base?.[name], tuned?.[name]),
  ]);
  const adapters = (found.adapters ?? []).map((one) => [
    one.name,
    count(one.trainableParameters),
    Object.entries(one.metrics ?? {})
      .map(([name, value]) => `${name} ${number(value)}`)
      .join(", "),
  ]);
  return section(
    "Result",
    rows.length ? table("Evaluation on held-out data", ["Metric", "Before", "After", "Change"], rows) : "",
    adapters.length ? table("Adapters", ["Adapter", "Trained parameters", "Metrics"], adapters) : "",
    facts([
      ["Where", h("code", {}, found.uri)],
      ["Merged", found.mergedUri ? h("code", {}, found.mergedUri) : ""],
      ["Size", found.sizeBytes ? bytes(found.sizeBytes) : ""],
      ["Trained parameters", found.trainableParameters ? count(found.trainableParameters) : ""],
      ["Manifest", found.manifestSha256 ? h("code", {}, `sha256:${found.manifestSha256.slice(0, 16)}…`) : ""],
    ]),
  );
}

function change(name, before, after) {
  if (typeof before !== "number" || typeof after !== "number") return "–";
  const difference = after - before;
  // A share of nothing, or of less than nothing, says nothing.
  const relative = !DIFFERENCES.has(name) && before > 0 && after >= 0;
  const shown = relative ? share(Math.abs(difference) / before) : number(Math.abs(difference));
  const better = LOWER_IS_BETTER.has(name) ? difference < 0 : difference > 0;
  return h(
    "span",
    { class: difference === 0 ? null : better ? "good" : "bad" },
    difference === 0 ? shown : `${difference > 0 ? "+" : "−"}${shown} ${better ? "better" : "worse"}`,
  );
}

/** Held-out prompts with the answers of both models. */
export function answers(job) {
  if (!job.answers.length) return "";
  return section(
    "Held-out prompts",
    job.answers.map((one, index) =>
      h(
        "details",
        { class: "answer", open: index === 0 },
        h("summary", {}, question(one.prompt)),
        facts(
          [
            ["Before", one.base ?? ""],
            ["After", one.tuned ?? ""],
            ["Expected", one.reference ?? ""],
          ].map(([label, text]) => [label, String(text)]),
        ),
      ),
    ),
  );
}

/** The last thing that was said to the model; a prompt is a list of chat messages, or text. */
function question(prompt) {
  const messages = Array.isArray(prompt) ? prompt : [{ content: prompt }];
  return String(messages.at(-1)?.content ?? "");
}
