// Chat and completion: from the form to a request, and from a stream's chunks to what is shown.

import { Refused, stream } from "./api.js";
import { $, count, duration, make } from "./dom.js";
import { TokenText, tokensOf } from "./tokens.js";

const NUMBERS = [
  ...["temperature", "max_tokens", "top_p", "top_k", "min_p", "seed"],
  ...["presence_penalty", "frequency_penalty", "repetition_penalty"],
];
const TOP = 5; // alternatives per token

const own = new Set(); // ids of the requests that run
/** The ids of this page's own requests that run. */
export const ownRequests = () => [...own];

export class Talk {
  #messages = []; // the conversation so far, as the API has it
  #running = null; // AbortController

  /** model: a function that gives its name; onRefused: is told of a key that is not accepted. */
  constructor(model, onRefused) {
    this.model = model;
    this.onRefused = onRefused;
  }

  get mode() {
    return document.querySelector("input[name=mode]:checked").value;
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#messages = [];
    $("log").replaceChildren($("hint") ?? make("p", { id: "hint", class: "hint", text: "Write below." }));
    this.#complain("");
  }

  async send() {
    const text = $("prompt").value;
    if (this.#running || !text.trim()) return;
    this.#complain("");
    const chat = this.mode === "chat";
    let body;
    try {
      body = this.#body(text, chat);
    } catch (error) {
      this.#complain(error.message);
      return;
    }
    $("hint")?.remove();
    const asked = chat ? this.block("user", "You") : null;
    asked?.append(make("div", { class: "text", text }));
    const replies = new Replies(this, chat, text);
    const messages = this.#messages;
    if (chat) {
      messages.push({ role: "user", content: text });
      $("prompt").value = "";
    }
    this.#running = new AbortController();
    this.#busy(true);
    try {
      const path = chat ? "/v1/chat/completions" : "/v1/completions";
      for await (const chunk of stream(path, body, this.#running.signal)) replies.take(chunk);
    } catch (error) {
      if (error.name === "AbortError") replies.stopped = true;
      else this.#failed(error, replies);
    }
    replies.end();
    const cleared = messages !== this.#messages; // while the reply came
    if (chat && !cleared && !this.#remember(text, replies)) asked.remove();
    this.#running = null;
    this.#busy(false);
  }

  #failed(error, replies) {
    replies.failed = true;
    if (!(error instanceof Refused)) console.error(error);
    this.#complain(error instanceof Refused ? error.message : `The page failed: ${error.message}`);
    if (error.status === 401) this.onRefused(error.message);
  }

  /** The conversation goes on from the first reply. False: there is none, and the question is in its box again. */
  #remember(text, replies) {
    if (replies.first || replies.calls) {
      this.#messages.push({ role: "assistant", content: replies.first });
      return true;
    }
    this.#messages.pop();
    if (!replies.failed || $("prompt").value) return true;
    $("prompt").value = text;
    return false;
  }

  #body(text, chat) {
    const body = { model: this.model() };
    for (const name of NUMBERS) {
      const field = $(name);
      if (!field.checkValidity()) throw new Error(`${name}: ${field.validationMessage}`);
      if (field.value !== "") body[name] = Number(field.value);
    }
    const stops = $("stop").value.split("\n").filter(Boolean);
    if (stops.length) body.stop = stops.map((one) => one.replaceAll("\\n", "\n"));
    if ($("service_tier").value) body.service_tier = $("service_tier").value;
    if ($("logprobs").checked) Object.assign(body, chat ? { logprobs: true, top_logprobs: TOP } : { logprobs: TOP });
    if (chat) {
      const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
      body.messages = [...system, ...this.#messages, { role: "user", content: text }];
    } else {
      body.prompt = text;
    }
    return Object.assign(body, more());
  }

  /** A new block of the conversation. */
  block(kind, name) {
    const title = make("h3", { text: name });
    const element = make("article", { class: `turn ${kind}` }, title);
    this.follow(() => $("log").append(element));
    return element;
  }

  /** Does `change`; who reads the end goes on doing so. */
  follow(change) {
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    change();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  #busy(busy) {
    $("stop-button").disabled = !busy;
    $("send").disabled = busy;
    $("log").setAttribute("aria-busy", busy);
  }

  #complain(message) {
    $("error").textContent = message;
    $("error").hidden = !message;
  }
}

function more() {
  const text = $("more").value.trim();
  if (!text) return {};
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`More fields: this is not JSON (${error.message}).`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Error("More fields: this must be a JSON object.");
  }
  return value;
}

/** The choices of one reply, one unless `n` was asked for. */
class Replies {
  stopped = false;
  failed = false;
  #views = new Map(); // index -> Reply
  #usage = null;
  #begin = performance.now();
  #first = null; // when the first token came
  #last = null;
  #tokens = 0;
  #id = null;

  constructor(talk, chat, prompt) {
    Object.assign(this, { talk, chat, prompt });
  }

  get first() {
    return this.#views.get(0)?.text ?? "";
  }

  get calls() {
    return this.#views.get(0)?.calls.size ?? 0;
  }

  take(chunk) {
    if (chunk.id && !this.#id) own.add((this.#id = chunk.id));
    if (chunk.usage) this.#usage = chunk.usage;
    this.talk.follow(() => {
      for (const choice of chunk.choices ?? []) {
        const delta = this.chat ? choice.delta : { content: choice.text };
        const empty = !delta.content && !choice.logprobs && !delta.reasoning_content && !delta.tool_calls;
        if (!empty) {
          this.#last = performance.now();
          this.#first ??= this.#last;
          this.#tokens += tokensOf(choice.logprobs).length || 1;
        }
        this.#view(choice.index).take(delta, tokensOf(choice.logprobs), choice.finish_reason);
      }
    });
  }

  #view(index) {
    let view = this.#views.get(index);
    if (!view) {
      const name = this.chat ? "Assistant" : "Completion";
      view = new Reply(this.talk.block("assistant", index ? `${name} ${index + 1}` : name), this.prompt, this.chat);
      this.#views.set(index, view);
    }
    return view;
  }

  end() {
    own.delete(this.#id);
    for (const [index, view] of this.#views) {
      const parts = index === Math.max(...this.#views.keys()) ? this.#figures() : [];
      this.talk.follow(() => view.end(this.stopped ? "stopped" : this.failed ? "broken off" : null, parts));
    }
    const text = this.first;
    if (text) $("live").textContent = `Reply: ${text.length > 400 ? `${text.slice(0, 400)} …` : text}`;
    else if (this.stopped) $("live").textContent = "Stopped.";
  }

  #figures() {
    const parts = [];
    const tokens = this.#usage?.completion_tokens ?? this.#tokens;
    const cached = this.#usage?.prompt_tokens_details?.cached_tokens;
    if (this.#usage) parts.push(`${count(this.#usage.prompt_tokens)} in${cached ? ` (${count(cached)} cached)` : ""}`);
    parts.push(`${count(tokens)} out`);
    if (this.#first !== null) {
      parts.push(`first token ${duration((this.#first - this.#begin) / 1000)}`);
      const seconds = (this.#last - this.#first) / 1000;
      if (tokens > 1 && seconds > 0) parts.push(`${count((tokens - 1) / seconds)} tokens/s`);
    }
    return parts;
  }
}

/** One choice. */
class Reply {
  text = "";
  calls = new Map(); // index -> its <pre>
  #finish = null;
  #reasoning = null;

  constructor(element, prompt, chat) {
    this.element = element;
    const text = make("div", { class: "text tokens" });
    if (!chat) text.append(make("span", { class: "given", text: prompt }));
    element.append(text);
    this.tokens = new TokenText(text);
  }

  take(delta, tokens, finish) {
    if (delta.reasoning_content) this.#reason(delta.reasoning_content);
    for (const call of delta.tool_calls ?? []) this.#call(call);
    const text = delta.content ?? "";
    this.text += text;
    // tokens of reasoning and calls are not the text's
    const apart = delta.reasoning_content || delta.tool_calls;
    if (text || (tokens.length && !apart)) this.tokens.add(text, apart ? [] : tokens);
    if (finish) this.#finish = finish;
  }

  end(why, figures) {
    this.tokens.end();
    const parts = [...figures, why ?? (this.#finish ? `finish: ${this.#finish}` : "")];
    this.element.append(make("p", { class: "figures", text: parts.filter(Boolean).join(" · ") }));
  }

  #reason(text) {
    if (!this.#reasoning) {
      this.#reasoning = make("div", { class: "text" });
      const details = make("details", { class: "reasoning", open: true }, make("summary", { text: "Reasoning" }));
      details.append(this.#reasoning);
      this.tokens.element.before(details);
    }
    this.#reasoning.append(text);
  }

  #call({ index, function: called }) {
    if (!this.calls.has(index)) {
      const code = make("pre", {});
      const name = make("code", { text: called?.name ?? "" });
      this.element.append(make("div", { class: "call" }, make("p", {}, "Tool call: ", name), code));
      this.calls.set(index, code);
    }
    this.calls.get(index).append(called?.arguments ?? "");
  }
}
