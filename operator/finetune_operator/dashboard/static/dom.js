// Elements. Whatever came from a server becomes text: nothing in this front end is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; `on...` attributes are listeners, null and false leave one out. */
export function h(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same, of SVG. */
export function s(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** Text of the API's descriptions: what stands between backticks is code. */
export function marked(text) {
  return text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));
}

/** Put text in a place, and leave it alone where it is there already: a reader is not told twice. */
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Replace what an element holds, only when what it is made of changed. */
export function keep(element, made, build) {
  const key = JSON.stringify(made);
  if (element.madeOf === key) return;
  element.madeOf = key;
  element.replaceChildren(...[build(made)].flat(Infinity).filter((child) => child !== null && child !== ""));
}

/** Say something to those who listen in place of looking. */
export function say(text) {
  put(document.getElementById("said"), text);
}
