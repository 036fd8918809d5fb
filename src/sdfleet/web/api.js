// All talk with the server: faults in the server's own words, sign-in when a key is wanted, streams that go on.

import { createStore } from "./ui.js";
import { text } from "./text.js";

/** Whether the server answers, and whether it wants a key first. */
export const connection = createStore({ isLost: false, wantsKey: false });

/** A fault as the server tells it. message: what happened; hint: what to do next. */
export class ApiError extends Error {
  constructor({ message, hint = "", code = "", field = null, status = 0, body = null }) {
    super(message);
    Object.assign(this, { hint, code, field, status, body });
  }
}

/** What a route answers. Raises ApiError. as: "json", "text", "blob" or "response". */
export async function call(path, { method = "GET", body, signal, headers = {}, as = "json" } = {}) {
  const sent = { "X-Requested-By": "sdfleet", ...headers };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, signal, headers: sent, credentials: "same-origin",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (cause) {
    if (signal?.aborted) throw cause;
    connection.set({ isLost: true });
    throw new ApiError({ message: text.lost, hint: text.lostHint, code: "unreachable" });
  }
  if (connection.get().isLost) connection.set({ isLost: false });
  if (!response.ok) throw await faultOf(response);
  if (as === "response") return response;
  if (response.status === 204) return null;
  return response[as]();
}

async function faultOf(response) {
  if (response.status === 401) connection.set({ wantsKey: true });
  let body = null;
  try {
    body = await response.json();
  } catch {
    // No JSON: a proxy in between, or a server that ends.
  }
  // Our own routes say `error` as a line, OpenAI's as an object, FastAPI's own as `detail`.
  const told = body?.error;
  const message = typeof told === "string" ? told : told?.message ?? (typeof body?.detail === "string" ? body.detail : text.status(response.status));
  const hint = body?.hint ?? told?.hint ?? "";
  return new ApiError({
    // `error` carries the hint after a semicolon, for programs that show one line.
    message: hint && message.endsWith(`; ${hint}`) ? message.slice(0, -hint.length - 2) : message,
    hint, code: body?.code ?? told?.code ?? "", field: body?.field ?? told?.param ?? null, status: response.status, body,
  });
}

/**
 * Server-sent events, which go on after a lost connection where they broke off. Returns what ends them.
 *
 * onEvent(name, data): each event, its JSON read. Ends by itself when onEvent returns "stop", and with onGone(error)
 * when the server refuses (404, 403). While a key is wanted it waits for the sign-in.
 */
export function listen(path, { onEvent, onGone = () => {}, onState = () => {} }) {
  const stop = new AbortController();
  run().catch((fault) => stop.signal.aborted || onGone(fault));
  return () => stop.abort();

  async function run() {
    let last = "";
    let waitMs = 500;
    while (!stop.signal.aborted) {
      try {
        const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
        const response = await call(path, { signal: stop.signal, headers, as: "response" });
        onState("live");
        waitMs = 500;
        for await (const event of events(response.body)) {
          if (event.id) last = event.id;
          if (event.data && onEvent(event.name, JSON.parse(event.data)) === "stop") return stop.abort();
        }
      } catch (fault) {
        if (stop.signal.aborted) return undefined;
        if (fault instanceof ApiError && fault.status >= 400 && fault.status < 500 && ![401, 408, 429].includes(fault.status)) throw fault;
      }
      onState("lost");
      await sleep(waitMs, stop.signal);
      waitMs = Math.min(waitMs * 1.6, 5000);
    }
    return undefined;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      left += value.replaceAll("\r", "");
      for (let end = left.indexOf("\n\n"); end >= 0; end = left.indexOf("\n\n")) {
        yield eventOf(left.slice(0, end));
        left = left.slice(end + 2);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function eventOf(block) {
  const event = { name: "message", data: "", id: "" };
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    if (colon <= 0) continue;
    const value = line.slice(colon + 1).replace(/^ /, "");
    const field = line.slice(0, colon);
    if (field === "data") event.data += event.data ? `\n${value}` : value;
    else if (field === "event") event.name = value;
    else if (field === "id") event.id = value;
  }
  return event;
}

/** Wait, or not if the signal ends it. */
export function sleep(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

/** The lines of a route that answers JSON line by line (NDJSON). Raises ApiError, also for a line `{"error"}`. */
export async function* lines(path, options) {
  const response = await call(path, { ...options, as: "response" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read();
    left += value ?? "";
    const whole = left.split("\n");
    left = done ? "" : whole.pop();
    for (const line of whole) {
      if (!line.trim()) continue;
      const told = JSON.parse(line);
      if (told.error) throw new ApiError({ message: told.error, code: told.code ?? "" });
      yield told;
    }
    if (done) return;
  }
}
