// The server's HTTP API: the key, and what went wrong in words.

import { events } from "./sse.js";

const STORED = "jaxserve.key";
let key = "";
try {
  key = sessionStorage.getItem(STORED) ?? "";
} catch {
  // storage is forbidden: the key lasts as long as the page
}

export const hasKey = () => key !== "";

/** keep: until the tab is closed; else as long as the page. */
export function setKey(value, keep) {
  key = value.trim();
  try {
    if (keep && key) sessionStorage.setItem(STORED, key);
    else sessionStorage.removeItem(STORED);
  } catch {
    // as above
  }
}

export function isKept() {
  try {
    return sessionStorage.getItem(STORED) !== null;
  } catch {
    return false;
  }
}

/** What the server or the way to it refused; `message` is meant for people. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (/[^\x21-\x7e]/.test(key)) throw new Refused(401, "An API key has no spaces and no letters beyond ASCII.");
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw new Refused(response.status, await inWords(response));
  return response;
}

async function inWords(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a proxy's answer, perhaps: the status has to do
  }
  return words(response.status, error, response.headers.get("Retry-After"));
}

function words(status, error, retryAfter) {
  const said = (error.message || `the server answered with status ${status}`).replace(/\.$/, "");
  if (status === 401) {
    return hasKey() ? "The server does not accept this API key." : "The server needs an API key: enter it above.";
  }
  if (status === 429) return `The server is full. Try again in ${retryAfter ?? "a few"} s.`;
  if (status === 503) return `The server is not ready: ${said}.`;
  if (status >= 500) return `The server failed: ${said}.`;
  return `The server refused this: ${said}.`;
}

export async function getJson(path) {
  return (await request(path)).json();
}

/** The chunks of a streamed reply. Raises Refused, also for an error inside of the stream. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const incoming = events(response);
  try {
    for (;;) {
      const { value: data, done } = await incoming.next().catch((error) => {
        if (error.name === "AbortError") throw error;
        return { done: true }; // the connection broke
      });
      if (done) throw new Refused(200, "The reply was broken off: the connection ended.");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(200, `The reply was broken off: ${chunk.error.message}.`);
      yield chunk;
    }
  } finally {
    incoming.return();
  }
}
