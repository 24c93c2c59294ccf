// What the fields of the form come to: the manifest, what is wrong with it, its plan.

import { h, keep, put, say } from "./dom.js";
import { memoryBar, planFacts, section } from "./parts.js";

/** `spec.layers.ids[0]: ...` is about `layers.ids`. */
export function pathOf(problem) {
  const path = problem.slice(0, Math.max(0, problem.indexOf(": "))).replace(/\[\d+\].*$/, "");
  return path.replace(/^spec\./, "");
}

/** The panel. goTo: given a field's path, a function that puts the focus there, or null; below: what stands at its end. */
export function outcomePanel({ goTo, below }) {
  const yaml = h("pre", { class: "yaml", tabindex: "0", "aria-label": "Manifest" });
  const verdict = h("p", { class: "verdict", role: "status" });
  const problems = h("ul", { class: "problems", "aria-label": "Problems" });
  const planned = h("div", { class: "slot" });
  const copy = h("button", { type: "button", class: "main", onclick: copied }, "Copy manifest");

  function show(answer, spec) {
    put(yaml, answer.text);
    // What has not been said yet is no mistake.
    const open = answer.problems.every((line) => line.includes(": missing"));
    verdict.dataset.valid = answer.valid ? "true" : open ? "open" : "false";
    const many = answer.problems.length;
    const wanting = `${many} thing${many === 1 ? "" : "s"} to be decided or corrected:`;
    put(verdict, answer.valid ? "Valid: the API takes it as it is." : wanting);
    keep(problems, answer.problems, (lines) => lines.map((line) => h("li", {}, linked(line))));
    keep(planned, [answer.plan, answer.gpuMemory, answer.note], () => (answer.plan ? planOf(answer, spec) : ""));
  }

  function fail(message) {
    verdict.dataset.valid = "false";
    put(verdict, message);
    keep(problems, [], () => []);
  }

  function linked(line) {
    const path = pathOf(line);
    const go = path ? goTo(path) : null;
    if (!go) return line;
    return [h("button", { type: "button", class: "link", onclick: go }, path), line.slice(line.indexOf(": "))];
  }

  async function copied() {
    try {
      await navigator.clipboard.writeText(yaml.textContent);
      say("copied");
      put(copy, "Copied");
    } catch {
      // Only pages over HTTPS or from this machine may write to the clipboard.
      getSelection().selectAllChildren(yaml);
      put(copy, "Selected: press Ctrl-C");
    }
    setTimeout(() => put(copy, "Copy manifest"), 2000);
  }

  const title = h("div", { class: "copying" }, h("h2", {}, "Manifest"), copy);
  return { element: h("div", { class: "outcome" }, verdict, problems, title, yaml, planned, below), show, fail };
}

function planOf(answer, spec) {
  const { plan, gpuMemory, note } = answer;
  return section(
    "Plan",
    planFacts(plan, spec),
    plan.memoryPerGPU ? memoryBar(plan.memoryPerGPU, gpuMemory) : "",
    note ? h("p", { class: "dim" }, note) : "",
  );
}
