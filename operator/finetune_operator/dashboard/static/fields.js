// Fields of the form, made of the API's own schema, and the values that were written into them.

import { h, marked } from "./dom.js";

const CHOICES = { true: true, false: false };

/** A field's control with its label, bounds and explanation. */
export function control(field, path, state, onChange) {
  const id = `f-${path}`;
  const about = `${id}-about`;
  const wrong = `${id}-wrong`;
  const said = state.get(path) ?? "";
  const common = {
    id,
    name: path,
    "aria-describedby": `${about} ${wrong}`,
    required: field.required ?? false,
    spellcheck: "false",
    autocomplete: "off",
  };
  const changed = (event) => {
    if (event.target.value === "") state.delete(path);
    else state.set(path, event.target.value);
    onChange();
  };
  const input = made(field, common, said, changed);
  const text = field.description ?? "";
  return h(
    "div",
    { class: "field", "data-path": path },
    h("label", { for: id }, h("span", {}, path), field.required ? h("em", {}, "required") : ""),
    input,
    h("p", { class: "wrong", id: wrong }),
    h("p", { class: "about", id: about }, marked(text), bounds(field)),
  );
}

function made(field, common, said, changed) {
  const hint =
    field.default === undefined || field.default === null
      ? ""
      : `default ${typeof field.default === "object" ? JSON.stringify(field.default) : field.default}`;
  if (field.kind === "choice" || field.kind === "boolean") {
    const choices = field.kind === "boolean" ? ["true", "false"] : field.enum.map(String);
    return h(
      "select",
      { ...common, onchange: changed },
      h("option", { value: "" }, hint || "not set"),
      choices.map((choice) => h("option", { value: choice, selected: choice === said }, choice)),
    );
  }
  const long = field.kind === "json" || (field.maxLength ?? 0) > 4096;
  const kind = { integer: "numeric", number: "decimal" }[field.kind];
  const placeholder = hint || { list: "one, two, … or JSON", json: "JSON" }[field.kind] || "";
  if (!long)
    return h("input", { ...common, type: "text", inputmode: kind, placeholder, value: said, oninput: changed });
  const area = h("textarea", { ...common, rows: 2, placeholder, oninput: changed });
  area.value = said;
  return area;
}

function bounds(field) {
  if (field.minimum === undefined && field.maximum === undefined) return "";
  const [low, high] = [field.minimum, field.maximum];
  const text = low === undefined ? `at most ${high}` : high === undefined ? `at least ${low}` : `${low} to ${high}`;
  return h("span", { class: "dim" }, ` (${text})`);
}

/** Every field that is no group, with its path. */
export function leaves(fields, prefix = "") {
  return fields.flatMap((field) => {
    const path = prefix ? `${prefix}.${field.name}` : field.name;
    return field.kind === "group" ? leaves(field.fields, path) : [{ field, path }];
  });
}

/** What was written into a field as JSON data; what has no such form stays text, and the server says what it is not. */
export function parsed(field, text) {
  const trimmed = text.trim();
  const isNumber = trimmed !== "" && Number.isFinite(Number(trimmed));
  switch (field.kind) {
    case "integer":
    case "number":
      return isNumber ? Number(trimmed) : trimmed;
    case "boolean":
      return CHOICES[trimmed] ?? trimmed;
    case "choice":
      return field.enum.find((choice) => String(choice) === trimmed) ?? trimmed;
    case "scalar":
      return /^\d+$/.test(trimmed) ? Number(trimmed) : trimmed;
    case "list": {
      // An item with a comma in it needs JSON.
      const items = trimmed.startsWith("[") ? fromJson(trimmed) : null;
      if (Array.isArray(items)) return items;
      return trimmed
        .split(/[,\n]/)
        .map((one) => one.trim())
        .filter(Boolean)
        .map((one) => parsed({ kind: field.items }, one));
    }
    case "json":
      return fromJson(trimmed);
    default:
      return field.maxLength > 4096 ? text : trimmed;
  }
}

/** What JSON says; text that is none stays text. */
function fromJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** The spec that the fields say, in the schema's order. */
export function specOf(fields, state) {
  const spec = {};
  for (const { field, path } of leaves(fields)) {
    if (!state.has(path)) continue;
    const steps = path.split(".");
    let place = spec;
    for (const step of steps.slice(0, -1)) place = place[step] ??= {};
    place[steps.at(-1)] = parsed(field, state.get(path));
  }
  return spec;
}

/** Fill the fields from a spec; what is the default is left out. Returns paths of what was not shown to us. */
export function fill(fields, spec, state) {
  const missing = [];
  for (const { field, path } of leaves(fields)) {
    const value = path.split(".").reduce((place, step) => place?.[step], spec);
    const json = JSON.stringify(value ?? null);
    if (json === "null" || json === JSON.stringify(field.default)) continue;
    if (json.includes("[hidden]")) missing.push(path);
    else state.set(path, typeof value === "object" ? written(field, value, json) : String(value));
  }
  return missing;
}

/** A list as people write it, where that is read as the same list. */
function written(field, value, json) {
  if (field.kind !== "list" || !value.length) return json;
  const text = value.join(", ");
  return JSON.stringify(parsed(field, text)) === json ? text : json;
}
