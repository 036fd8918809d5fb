// What was asked for: the newest requests, what became of each, and why it was drawn where it was.

import { call } from "./api.js";
import { span, time } from "./dashboard_charts.js";
import { text } from "./text.js";
import { Badge, Button, Dialog, Fault, html, toast, toastError, useEffect, useState } from "./ui.js";

const words = text.dashboard;
const KINDS = { completed: "good", failed: "bad", cancelled: "plain", running: "accent", queued: "plain" };
const FILTERS = {
  all: () => true,
  open: (one) => one.status === "queued" || one.status === "running",
  completed: (one) => one.status === "completed",
  failed: (one) => one.status === "failed",
};

/** traces: newest first. rights: {mayGenerate, isRouter}. shown, show: the id of the one whose window is open. */
export function Requests({ traces, rights, shown, show, onChange }) {
  const [filter, setFilter] = useState("all");
  const list = traces.filter(FILTERS[filter]);
  const open = traces.find((one) => one.request_id === shown);
  return html`<section aria-labelledby="requests-title">
    <div class="section-head"><h2 id="requests-title">${words.requests}</h2><span class="small quiet-text">${words.requestsHint(rights.mayManage)}</span>
      <div class="segments" role="group" aria-label=${words.show}>${Object.keys(FILTERS).map((name) => html`<button type="button" key=${name}
        aria-pressed=${String(filter === name)} onClick=${() => setFilter(name)}>${words.filters[name]}</button>`)}</div></div>
    <div class="card table-wrap tall" tabindex="0" role="group" aria-labelledby="requests-title">
      ${list.length === 0 ? html`<p class="empty">${words.noRequests}</p>` : html`<table class="table requests">
        <thead><tr><th scope="col">${words.when}</th><th scope="col">${words.state}</th><th scope="col">${words.model}</th><th scope="col" class="minor">${words.picture}</th>
          <th scope="col" class="minor">${words.node}</th><th scope="col" class="num minor">${words.wait}</th><th scope="col" class="num minor">${words.drew}</th><th scope="col" class="num">${words.total}</th></tr></thead>
        <tbody>${list.map((one) => html`<tr key=${one.request_id}>
          <td><button type="button" class="link num" aria-label=${words.open(time(one.timestamp), one.request_id)} onClick=${() => show(one.request_id)}>${time(one.timestamp)}</button></td>
          <td><${Badge} kind=${KINDS[one.status]}>${words.states[one.status]}<//>${one.retry_count > 0 && html` <span class="small quiet-text">×${one.retry_count + 1}</span>`}</td>
          <td>${one.model}</td><td class="nowrap minor">${one.width}×${one.height}${one.n > 1 ? ` × ${one.n}` : ""}, ${words.stepsOf(one.steps)}</td><td class="minor">${one.node_id}</td>
          <td class="num minor">${span(one.wait_ms)}</td><td class="num minor">${span(one.generation_ms)}</td><td class="num">${span(one.latency_ms)}</td></tr>`)}</tbody></table>`}
    </div>
    ${open && html`<${Details} one=${open} rights=${rights} onClose=${() => show(null)} onChange=${onChange} />`}
  </section>`;
}

function Details({ one, rights, onClose, onChange }) {
  const isOpen = FILTERS.open(one);
  const tell = async (method, path, told) => {
    try {
      await call(`/api/jobs/${one.request_id}${path}`, { method });
      toast(told, { kind: "good" });
      onClose();
      onChange();
    } catch (fault) {
      toastError(fault);
    }
  };
  const foot = rights.mayGenerate && html`
    ${isOpen && html`<${Button} kind="danger" onClick=${() => tell("DELETE", "", words.stopped)}>${words.stop}<//>`}
    ${(one.status === "failed" || one.status === "cancelled") && html`<${Button} onClick=${() => tell("POST", "/retry", words.triesAgain)}>${words.tryAgain}<//>`}
    <${Button} onClick=${onClose}>${text.close}<//>`;
  const facts = [
    [words.state, html`<${Badge} kind=${KINDS[one.status]}>${words.states[one.status]}<//>`],
    [words.model, one.model],
    [words.picture, `${one.width}×${one.height}${one.n > 1 ? ` × ${one.n}` : ""}, ${words.stepsOf(one.steps)}`],
    [words.node, one.node_id || "–"],
    [words.wait, span(one.wait_ms)],
    [words.drew, span(one.generation_ms)],
    [words.total, span(one.latency_ms)],
    [words.tries, String(one.retry_count + 1)],
    [words.dialect, one.dialect],
    [words.client, one.client_ip || "–"],
    ...(one.tags.length ? [[words.tags, one.tags.join(", ")]] : []),
  ];
  return html`<${Dialog} title=${words.request(one.request_id)} onClose=${onClose} foot=${foot} class=${rights.isRouter ? "wide" : ""}>
    ${one.error_message && html`<${Fault} error=${{ message: one.error_message, hint: one.error_hint }} />`}
    <dl class="facts">${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    <h3>${words.why}</h3>
    ${rights.isRouter ? html`<${Why} id=${one.request_id} />` : html`<p class="quiet-text">${words.whyHere}</p>`}
  <//>`;
}

function Why({ id }) {
  const [why, setWhy] = useState(null);
  const [fault, setFault] = useState(null);
  useEffect(() => {
    const away = new AbortController();
    call(`/fleet/jobs/${id}/why`, { signal: away.signal }).then(setWhy).catch((error) => away.signal.aborted || setFault(error));
    return () => away.abort();
  }, [id]);
  if (fault) return html`<${Fault} error=${fault} />`;
  if (!why) return html`<p class="quiet-text" aria-busy="true">${text.loading}</p>`;
  const s = (seconds) => span(seconds * 1000);
  return html`<p>${why.why}</p>${why.placement && html`<div class="table-wrap" tabindex="0" role="group" aria-label=${words.candidates}><table class="table">
    <caption class="visually-hidden">${words.candidates}</caption>
    <thead><tr><th scope="col">${words.node}</th><th scope="col" class="num">${words.waiting}</th><th scope="col" class="num">${words.load}</th>
      <th scope="col" class="num">${words.draw}</th><th scope="col" class="num">${words.costsOthers}</th><th scope="col" class="num">${words.sum}</th></tr></thead>
    <tbody>${why.placement.candidates.map((one) => html`<tr key=${one.device_id} class=${one.device_id === why.placement.chosen ? "chosen" : ""}>
      <th scope="row">${one.name} ${one.device_id === why.placement.chosen && html`<${Badge} kind="good">${words.chosen}<//>`}</th>
      ${one.refused ? html`<td colspan="5" class="quiet-text">${one.refused}</td>` : html`<td class="num">${s(one.wait_s)}</td><td class="num">${s(one.load_s)}</td>
        <td class="num">${s(one.draw_s)}</td><td class="num">${s(one.price_s + one.neighbours_s)}</td><td class="num"><b>${s(one.cost_s)}</b></td>`}</tr>`)}</tbody></table></div>`}`;
}
