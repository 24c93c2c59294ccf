// Builds a manifest: fields on the left, what they come to on the right. The server checks it as it is written.

import { post } from "./api.js";
import { h, marked, put } from "./dom.js";
import { control, fill, leaves, specOf } from "./fields.js";
import { outcomePanel, pathOf } from "./outcome.js";

const PAUSE_MS = 350;

/** The page. schema: as the server sent it; from: a job to begin with, or null. */
export function formPage(schema, from, about) {
  const state = new Map();
  const meta = {
    name: from ? `${from.name}-2` : "my-job",
    namespace: from && about?.kind !== "runs" ? from.namespace : "",
  };
  const missing = from ? fill(schema.fields, from.spec, state) : [];
  if (!from) state.set("method", "lora");
  let timer = 0;
  let asking = new AbortController();

  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(check, PAUSE_MS);
  };
  const config = h("textarea", {
    id: "config",
    rows: 4,
    spellcheck: "false",
    placeholder: '{"model_type": "llama", …}',
    oninput: later,
    "aria-describedby": "config-about",
  });
  const outcome = outcomePanel({ goTo, below: pasted(config) });
  const form = h(
    "form",
    { "aria-label": "Fields of the job", onsubmit: (event) => event.preventDefault() },
    fieldsOf(schema, meta, state, later),
  );
  const hint = from
    ? `Begun with what ${from.name} says${missing.length ? `, but for what is not shown here: ${missing.join(", ")}` : ""}.`
    : "Builds a manifest for kubectl apply or finetune run. Nothing is created here.";

  async function check() {
    asking.abort();
    const mine = (asking = new AbortController());
    const metadata = Object.fromEntries(Object.entries(meta).filter(([, value]) => value));
    const spec = specOf(schema.fields, state);
    const manifest = { apiVersion: schema.apiVersion, kind: schema.kind, metadata, spec };
    try {
      const answer = await post("check", { manifest, config: config.value.trim() || null }, mine.signal);
      outcome.show(answer, spec);
      mark(form, answer.problems);
    } catch (error) {
      if (!mine.signal.aborted) outcome.fail(error.message);
    }
  }

  function goTo(path) {
    const name = CSS.escape(path);
    const field = form.querySelector(`[data-path="${name}"]`) ?? form.querySelector(`[data-path^="${name}."]`);
    if (!field) return null;
    return () => {
      const group = field.closest("details");
      if (group) group.open = true;
      field.querySelector("input, select, textarea").focus();
    };
  }

  check();
  return h(
    "div",
    { class: "page form" },
    h("div", { class: "title" }, h("h1", {}, "New job"), h("p", { class: "dim" }, hint)),
    h("div", { class: "columns wide" }, form, outcome.element),
  );
}

/** The most common fields, then all others by their groups. */
function fieldsOf(schema, meta, state, later) {
  const byPath = new Map(leaves(schema.fields).map(({ field, path }) => [path, field]));
  const fieldOf = (path) => control(byPath.get(path), path, state, later);
  const first = new Set(schema.first);
  const groups = schema.fields.map((field) => {
    const all = field.kind === "group" ? leaves(field.fields, field.name).map((one) => one.path) : [field.name];
    const paths = all.filter((path) => !first.has(path));
    if (!paths.length) return "";
    const about = h("span", { class: "dim" }, marked(field.description ?? ""));
    return h(
      "details",
      { class: "group", open: paths.some((path) => state.has(path)) },
      h("summary", {}, h("b", {}, field.name), " ", about),
      h("div", { class: "fields" }, paths.map(fieldOf)),
    );
  });
  const common = [
    metaField("name", meta, `Letters, digits and -, at most ${schema.maxNameLength}.`, later),
    metaField("namespace", meta, "Empty: where kubectl applies it.", later),
    schema.first.map(fieldOf),
  ];
  return [h("div", { class: "fields" }, common), h("h2", {}, "Everything else"), groups];
}

function metaField(name, meta, hint, later) {
  const id = `m-${name}`;
  const change = (event) => {
    meta[name] = event.target.value.trim();
    later();
  };
  return h(
    "div",
    { class: "field", "data-path": `metadata.${name}` },
    h("label", { for: id }, h("span", {}, `metadata.${name}`)),
    h("input", {
      id,
      type: "text",
      value: meta[name],
      "aria-describedby": `${id}-wrong ${id}-about`,
      spellcheck: "false",
      autocomplete: "off",
      oninput: change,
    }),
    h("p", { class: "wrong", id: `${id}-wrong` }),
    h("p", { class: "about", id: `${id}-about` }, hint),
  );
}

function pasted(config) {
  const why = h("span", { class: "dim" }, "for a plan without a network");
  return h(
    "details",
    { class: "group" },
    h("summary", {}, h("b", {}, "config.json of the model"), " ", why),
    h(
      "div",
      { class: "field" },
      h("label", { for: "config" }, "Paste it here"),
      config,
      h("p", { class: "about", id: "config-about" }, "It is sent to this server, to plan with, and kept nowhere."),
    ),
  );
}

/** Say at each field what is wrong with it. */
function mark(form, problems) {
  const wrong = new Map(problems.map((line) => [pathOf(line), line.slice(line.indexOf(": ") + 2)]));
  for (const field of form.querySelectorAll(".field[data-path]")) {
    const text = wrong.get(field.dataset.path) ?? "";
    const shown = text.startsWith("missing") ? "" : text;
    put(field.querySelector(".wrong"), shown);
    field.querySelector("input, select, textarea").setAttribute("aria-invalid", String(Boolean(shown)));
  }
}
