// The server's state, asked for once a second while anybody can see it: slots, pages, and how fast it goes.

import { Refused, getJson } from "./api.js";
import { $, count, duration, make } from "./dom.js";
import { Plot } from "./plots.js";
import { ownRequests } from "./talk.js";

const EVERY = 1000; // ms
const WINDOW = 10; // seconds that latencies are taken over
const ROWS = 64; // of the table; the map shows all slots

/** The figure below which the share `q` of a histogram's values lies, as Prometheus' histogram_quantile. */
function quantile(bounds, counts, q) {
  const wanted = q * counts.at(-1);
  const at = counts.findIndex((value) => value >= wanted);
  const low = at ? bounds[at - 1] : 0;
  if (bounds[at] === null) return low;
  const before = at ? counts[at - 1] : 0;
  return low + ((bounds[at] - low) * (wanted - before)) / (counts[at] - before);
}

/** Mean and p95 of what a histogram took in between two answers; null where that is nothing. */
function between(now, then) {
  const counts = now.counts.map((value, at) => value - then.counts[at]);
  const total = counts.at(-1);
  if (total <= 0) return null; // less than nothing: the server was started anew
  const mean = (now.sum - then.sum) / total;
  return { mean, p95: total === 1 ? mean : quantile(now.bounds, counts, 0.95) };
}

export class ServerView {
  #timer = null;
  #asking = false;
  #answers = []; // of the last WINDOW seconds

  /** onState: is given every answer; onRefused: told when the key is not accepted. */
  constructor(onState, onRefused) {
    Object.assign(this, { onState, onRefused });
    const perSecond = (value) => `${count(value)}/s`;
    this.plots = {
      rate: new Plot(
        $("rate-plot"),
        [{ name: "generated", color: "--decode" }, { name: "prompt", color: "--prefill" }],
        perSecond,
        10,
      ),
      queue: new Plot(
        $("queue-plot"),
        [{ name: "waiting", color: "--warn" }, { name: "running", color: "--decode" }],
        (value) => `${count(value)} seq`,
        4,
      ),
      ttft: latencyPlot("ttft-plot", 0.1),
      itl: latencyPlot("itl-plot", 0.01),
    };
    document.addEventListener("visibilitychange", () => this.restart());
    this.restart();
  }

  /** Asks at once, and then every second while the page can be seen. */
  restart() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (!document.hidden) this.#ask();
  }

  redraw() {
    for (const plot of Object.values(this.plots)) plot.draw();
  }

  async #ask() {
    if (this.#asking) return;
    this.#asking = true;
    let again = EVERY;
    try {
      const query = ownRequests().map((id) => `mine=${encodeURIComponent(id)}`).join("&");
      this.#take(await getJson(query ? `/state?${query}` : "/state"));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      again = error.status === 401 ? null : 2 * EVERY;
      this.#say("lost", error.status === 401 ? "needs a key" : error.message);
      if (error.status === 401) this.onRefused(error.message);
    } finally {
      this.#asking = false;
    }
    if (again !== null && !document.hidden) this.#timer = setTimeout(() => this.#ask(), again);
  }

  #say(status, text) {
    $("status").dataset.status = status;
    if ($("status-text").textContent !== text) $("status-text").textContent = text;
  }

  #take(state) {
    this.#say(state.status, state.status === "ready" ? "" : (state.message ?? state.status));
    $("model").textContent = state.model || "no model yet";
    this.onState(state);
    if (!state.slots) return;
    this.#slots(state);
    this.#pages(state.pages);
    this.#plot(state);
  }

  #slots({ slots: { total, held } }) {
    const bySlot = new Map(held.map((one) => [one.slot, one]));
    const map = $("slots-map");
    while (map.childElementCount < total) map.append(make("i"));
    while (map.childElementCount > total) map.lastElementChild.remove();
    [...map.children].forEach((cell, slot) => {
      const one = bySlot.get(slot);
      cell.className = one ? `${one.state}${one.mine ? " mine" : ""}` : "free";
      cell.title = one ? `slot ${slot}: ${stateOf(one)}` : `slot ${slot}: free`;
    });
    const prefilling = held.filter((one) => one.state === "prefill").length;
    $("slots-figure").textContent = `${held.length} of ${count(total)} held`;
    map.setAttribute(
      "aria-label",
      `${held.length} of ${total} slots held, ${prefilling} prefilling, ${held.length - prefilling} decoding`,
    );
    const rows = held.slice(0, ROWS).map(row);
    if (held.length > ROWS) rows.push(note(`and ${held.length - ROWS} more`));
    if (!held.length) rows.push(note("All slots are free."));
    $("slots").tBodies[0].replaceChildren(...rows);
  }

  #pages({ total, used, cached, free, tokens }) {
    const parts = [["used", used], ["cached", cached], ["free", free]];
    $("pages-bar").replaceChildren(...parts.map(([name, pages]) => segment(name, pages / (total || 1))));
    $("pages-bar").setAttribute("aria-label", parts.map(([name, pages]) => `${count(pages)} ${name}`).join(", "));
    $("pages-figure").textContent = `${count(used)} of ${count(total)} used, ${count(tokens)} tokens each`;
    const legend = parts.flatMap(([name, pages]) => [make("i", { class: name }), ` ${name} ${count(pages)} `]);
    $("pages-legend").replaceChildren(...legend);
  }

  #plot(state) {
    const now = state.seconds;
    const before = this.#answers.at(-1);
    if (before && (now <= before.seconds || state.totals.requests < before.totals.requests)) {
      this.#answers = []; // another process answers
    }
    const last = this.#answers.at(-1);
    this.#answers.push(state);
    while (this.#answers[0].seconds < now - WINDOW - 0.5) this.#answers.shift();
    const { waiting, running, preempted, tokens } = state.queue;
    $("queue-figure").textContent =
      `${count(waiting)} waiting` + (preempted ? `, ${count(preempted)} preempted` : ` (${count(tokens)} tokens)`);
    this.plots.queue.add(now, [waiting, running], `${waiting} waiting, ${running} running`);
    const rate = (name) =>
      last ? Math.max(0, (state.totals[name] - last.totals[name]) / (now - last.seconds)) : null;
    const [generated, prompt] = [rate("generated_tokens"), rate("prompt_tokens")];
    const figure = generated === null ? "" : `${count(generated)} generated/s`;
    $("rate-figure").textContent = figure;
    this.plots.rate.add(now, [generated, prompt], figure);
    for (const name of ["ttft", "itl"]) {
      const recent = last ? between(state.latency[name], this.#answers[0].latency[name]) : null;
      const text = recent ? `mean ${duration(recent.mean)}, p95 ${duration(recent.p95)}` : `none in ${WINDOW} s`;
      $(`${name}-figure`).textContent = text;
      this.plots[name].add(now, [recent?.p95 ?? null, recent?.mean ?? null], text);
    }
  }
}

function latencyPlot(id, least) {
  return new Plot(
    $(id),
    [{ name: "p95", color: "--prefill" }, { name: "mean", color: "--decode" }],
    (value) => (value ? duration(value) : "0"),
    least,
  );
}

/** Without what every id begins with, so that what tells them apart is seen first. */
const short = (id) => id.replace(/^[a-z]+[-_]/, "");

const stateOf = (one) => `${one.state === "prefill" ? "prefilling" : "decoding"} ${one.request}`;

function segment(name, share) {
  const part = make("i", { class: name });
  part.style.setProperty("--share", share);
  return part;
}

function row(one) {
  const { prompt, computed, cached } = one;
  const bar = make("div", { class: "bar" }, segment("cached", cached / prompt));
  bar.append(segment("computed", Math.max(0, computed - cached) / prompt));
  const words = `${count(computed)} of ${count(prompt)}${cached ? `, ${count(cached)} cached` : ""}`;
  const who = make("td", {}, make("span", { class: "id", text: short(one.request), title: one.request }));
  const state = make("span", { class: "under", text: one.state === "prefill" ? "prefilling" : "decoding" });
  state.append(one.index ? `, choice ${one.index + 1}` : "", one.tier === "flex" ? ", flex" : "");
  if (one.mine) state.append(" ", make("span", { class: "tag", text: "yours" }));
  who.append(state);
  const shared = make("span", { class: "under", text: one.shared ? `${count(one.shared)} shared` : "" });
  return make(
    "tr",
    { class: one.mine ? "mine" : false },
    make("th", { scope: "row" }, make("i", { class: one.state }), ` ${one.slot}`),
    who,
    make("td", {}, bar, make("span", { class: "under", text: words })),
    make("td", { class: "number", text: count(one.generated) }),
    make("td", { class: "number", text: count(one.pages) }, shared),
  );
}

const note = (text) => make("tr", {}, make("td", { colspan: 5, class: "dim", text }));
