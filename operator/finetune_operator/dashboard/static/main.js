// The frame: which page is shown, who is signed in, whether the server answers.

import { Refused, get, poll, token } from "./api.js";
import { h, marked, put } from "./dom.js";
import { formPage } from "./form.js";
import { jobPage } from "./job.js";
import { listPage } from "./list.js";
import { refreshTimes } from "./parts.js";

const LIST_MS = 3000;
const JOB_MS = 2000;

const content = document.getElementById("content");
const live = document.getElementById("live");
let polling = null;
let about = null;
/** Counts what was opened: what comes late for a page that was left is dropped. */
let visit = 0;

const routes = [
  [/^#\/?$/, showList],
  [/^#\/jobs\/([^/]+)\/([^/]+)$/, showJob],
  [/^#\/new(?:\/([^/]+)\/([^/]+))?$/, showForm],
];

function state(kind, text) {
  live.dataset.state = kind;
  put(live, text);
}

function follow(path, every, page) {
  polling = poll(path, every, {
    onData: (data) => {
      // What was gone may have come back.
      if (!page.element.isConnected) content.replaceChildren(page.element);
      page.update(data);
    },
    onAlive: () => {
      state("live", "live");
      refreshTimes(page.element);
    },
    onError: (error, failures) => {
      if (error instanceof Refused && error.status === 401) return signIn(error.message);
      if (error instanceof Refused && error.status === 404) {
        content.replaceChildren(problem("Not found", error.message));
        return state("live", "live");
      }
      // One failure is a connection that was closed between two looks.
      if (failures > 1 || error instanceof Refused) {
        state("lost", error instanceof Refused ? error.message : "no answer; trying again");
        if (!content.hasChildNodes()) content.append(problem("Nothing to show yet", live.textContent));
      }
    },
  });
}

function problem(title, text) {
  return h(
    "section",
    { class: "notice" },
    h("h1", {}, title),
    h("p", {}, text),
    h("p", {}, h("a", { href: "#/" }, "All jobs")),
  );
}

function open(page, title) {
  document.title = title ? `${title} · finetune` : "finetune";
  content.replaceChildren(page);
}

function showList() {
  const page = listPage(about);
  open(page.element, "Jobs");
  follow("jobs", LIST_MS, page);
}

function showJob(namespace, name) {
  const page = jobPage(about, namespace, name);
  open(page.element, name);
  const path = `jobs/${encodeURIComponent(namespace)}/${encodeURIComponent(name)}`;
  follow(path, JOB_MS, page);
}

async function showForm(namespace, name) {
  const mine = visit;
  const path = namespace ? `jobs/${encodeURIComponent(namespace)}/${encodeURIComponent(name)}` : null;
  const [fields, from] = await Promise.all([get("form"), path ? get(path) : null]);
  if (mine !== visit) return;
  state("", "");
  open(formPage(fields, from, about), "New job");
}

function signIn(reason) {
  visit += 1;
  polling?.stop();
  state("", "");
  const field = h("input", { id: "token", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const enter = (event) => {
    event.preventDefault();
    token.set(field.value.trim());
    start();
  };
  open(
    h(
      "section",
      { class: "notice" },
      h("h1", {}, "Sign in"),
      h("p", { role: "alert" }, marked(reason)),
      h(
        "form",
        { onsubmit: enter },
        h("label", { for: "token" }, "Token"),
        field,
        h("button", { type: "submit", class: "main" }, "Sign in"),
      ),
      h("p", { class: "dim" }, "It is kept in this tab alone, until the tab is closed."),
    ),
    "Sign in",
  );
  field.focus();
}

async function route() {
  const mine = (visit += 1);
  polling?.stop();
  polling = null;
  for (const [id, prefix] of [
    ["nav-jobs", /^#\/?($|jobs)/],
    ["nav-new", /^#\/new/],
  ]) {
    const link = document.getElementById(id);
    if (prefix.test(location.hash || "#/")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const [pattern, show] of routes) {
    const found = pattern.exec(location.hash || "#/");
    if (!found) continue;
    try {
      await show(...found.slice(1).map((part) => (part === undefined ? part : decodeURIComponent(part))));
    } catch (error) {
      if (mine !== visit) return;
      if (error instanceof Refused && error.status === 401) return signIn(error.message);
      open(problem("This did not work", error.message));
    }
    return;
  }
  open(problem("Not found", "There is no such page."));
}

async function start() {
  try {
    about = await get("about");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return signIn(error.message);
    state("lost", error.message);
    setTimeout(start, 5000);
    return;
  }
  put(document.getElementById("place"), about.place);
  put(document.getElementById("who"), about.kind === "operator" ? about.user : "");
  document.getElementById("sign-out").hidden = !token.get() || about.kind !== "operator";
  await route();
}

document.getElementById("sign-out").addEventListener("click", () => {
  token.set("");
  about = null;
  put(document.getElementById("who"), "");
  document.getElementById("sign-out").hidden = true;
  signIn("You are signed out.");
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  content.focus();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && document.getElementById("search")) {
    event.preventDefault();
    document.getElementById("search").focus();
  }
});
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) {
    // The address of another `finetune dashboard`, in a tab that is open.
    token.fromAddress();
    start();
  } else {
    route();
    content.focus({ preventScroll: false });
  }
});
token.fromAddress();
start();
