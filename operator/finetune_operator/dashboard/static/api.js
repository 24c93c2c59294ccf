// Talks to the server: the token, requests, and polling that costs next to nothing while nothing changes (ETag).

import { serverTime } from "./format.js";

const KEY = "finetune-token";
const PATIENCE_MS = 20_000;
const LONGEST_PAUSE_MS = 30_000;

/** What the server said to a request that it did not fulfil. */
export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** The token of this tab, which ends with it. */
export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
  /** Take the token out of the address that `finetune dashboard` printed, so that it is not copied with it. */
  fromAddress() {
    const found = /^#token=([\w.~-]+)$/.exec(location.hash);
    if (!found) return;
    token.set(found[1]);
    history.replaceState(null, "", `${location.pathname}${location.search}#/`);
  },
};

async function request(path, { etag = null, body = null, signal = null } = {}) {
  const headers = {};
  // Twice: the API server keeps `Authorization` to itself where this comes through its proxy.
  if (token.get()) Object.assign(headers, { Authorization: `Bearer ${token.get()}`, "X-Finetune-Token": token.get() });
  if (etag) headers["If-None-Match"] = etag;
  if (body !== null) headers["Content-Type"] = "application/json";
  const options = { headers, method: body === null ? "GET" : "POST", cache: "no-store", credentials: "same-origin" };
  const patience = AbortSignal.timeout(PATIENCE_MS);
  const response = await fetch(`api/${path}`, {
    ...options,
    body: body === null ? undefined : JSON.stringify(body),
    signal: signal ? AbortSignal.any([signal, patience]) : patience,
  });
  serverTime(response.headers.get("Date"));
  if (response.status === 304) return { etag, data: null };
  const data = await response.json().catch((error) => {
    if (!(error instanceof SyntaxError)) throw error;
    // A page that a proxy in front made, where somebody has to sign in anew perhaps.
    if (response.ok) throw new Refused(response.status, "what answers here is not the dashboard; reload the page");
    return null;
  });
  if (!response.ok) throw new Refused(response.status, data?.problem ?? `the server answered ${response.status}`);
  return { etag: response.headers.get("ETag"), data };
}

/** What is at an address. */
export async function get(path) {
  return (await request(path)).data;
}

/** Send something to be checked. */
export async function post(path, body, signal) {
  return (await request(path, { body, signal })).data;
}

/** Ask again and again while the page is looked at, until `stop` is called. */
export function poll(path, everyMs, { onData, onError, onAlive }) {
  let etag = null;
  let failures = 0;
  let timer = 0;
  let asking = false;
  const ended = new AbortController();

  const again = () => {
    const pause = failures ? Math.min(LONGEST_PAUSE_MS, everyMs * 2 ** failures) : everyMs;
    timer = setTimeout(look, pause);
  };
  const look = async () => {
    clearTimeout(timer);
    if (document.hidden || asking) return;
    asking = true;
    try {
      const answer = await request(path, { etag, signal: ended.signal });
      if (ended.signal.aborted) return;
      if (answer.data !== null) {
        onData(answer.data);
        // Only now: what could not be shown is asked for again, and counts as a failure.
        etag = answer.etag;
      }
      failures = 0;
      onAlive();
    } catch (error) {
      if (ended.signal.aborted) return;
      failures += 1;
      onError(error, failures);
      if (error instanceof Refused && error.status === 401) return;
    } finally {
      asking = false;
    }
    again();
  };
  const seen = () => !document.hidden && look();
  document.addEventListener("visibilitychange", seen);
  look();
  return {
    stop() {
      ended.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    },
  };
}
