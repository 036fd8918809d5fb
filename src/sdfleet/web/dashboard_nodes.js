// The machines: what each has, what it draws, and what may be done to it.

import { call } from "./api.js";
import { bytes, text } from "./text.js";
import { Badge, Button, Dialog, Icon, Progress, copyText, html, toast, toastError, useState } from "./ui.js";

const words = text.dashboard;
const GIB = 2 ** 30;
// A node that draws forty small pictures at once still fits the screen.
const MAX_SHOWN = 6;
const KINDS = { online: "good", degraded: "warn", suspect: "warn", offline: "bad" };

/** nodes, jobs: of the newest snapshot. rights: {mayManage, isRouter}. */
export function Nodes({ nodes, jobs, rights, pending, onAsk }) {
  const [code, setCode] = useState(null);
  const addNode = async () => {
    try {
      setCode(await call("/fleet/code", { method: "POST", body: {} }));
    } catch (fault) {
      toastError(fault);
    }
  };
  return html`<section aria-labelledby="nodes-title">
    <div class="section-head"><h2 id="nodes-title">${words.nodes}</h2>
      ${rights.isRouter && rights.mayManage && html`<${Button} class="small" onClick=${addNode}>${words.addNode}<//>`}</div>
    ${pending.map((one) => html`<${Asking} key=${one.code} one=${one} onAsk=${onAsk} />`)}
    ${nodes.length === 0 && html`<p class="card empty">${words.noNodes}</p>`}
    <div class="nodes">${nodes.map((node) => html`<${Node} key=${node.node_id} node=${node} rights=${rights}
      jobs=${jobs.filter((job) => job.node_id === node.node_id)} />`)}</div>
    ${code && html`<${Dialog} title=${words.addNodeTitle} onClose=${() => setCode(null)}>
      <p>${words.addNodeWhy}</p><${Command} command=${code.command ?? `sdfleet node --join ${code.code}`} /><//>`}
  </section>`;
}

function Asking({ one, onAsk }) {
  const approve = async () => {
    try {
      await call(`/fleet/nodes/${encodeURIComponent(one.code)}/approve`, { method: "POST", body: {} });
      toast(words.approved(one.name), { kind: "good" });
      onAsk();
    } catch (fault) {
      toastError(fault);
    }
  };
  return html`<div class="card asking"><${Icon} name="key" /><p class="grow"><b>${one.name}</b> ${words.asks} <code>${one.code}</code>.
    <span class="hint">${words.asksHint}</span></p><${Button} kind="primary" onClick=${approve}>${words.approve}<//></div>`;
}

/** A command with a button that copies it. */
export function Command({ command }) {
  return html`<div class="command"><code>${command}</code>
    <${Button} kind="quiet" icon="copy" label=${`${text.copy}: ${command}`} class="small" onClick=${() => copyText(command)} /></div>`;
}

function Node({ node, jobs, rights }) {
  const memory = node.memory ?? {};
  const device = node.device ?? null;
  // A device that shares the machine's memory has none of its own to show.
  const hasOwn = device?.memory_total_bytes > 0 && Math.abs(device.memory_total_bytes / GIB - (memory.total_gb ?? 0)) > 0.1;
  const draining = node.is_draining ?? false;
  const name = node.name || node.node_id;
  const chip = [device?.name && device.name !== "none" ? device.name.toUpperCase() : "", node.hardware?.chip ?? ""].filter(Boolean);
  return html`<article class="card node" aria-label=${name}>
    <header class="card-head"><h3>${name}</h3><span class="row">
      ${draining && html`<${Badge} kind="warn">${words.draining}<//>`}
      <${Badge} kind=${KINDS[node.status] ?? "plain"}>${words.standing[node.status] ?? node.status}<//></span></header>
    <div class="card-body stack-s">
      <p class="small quiet-text">${[...new Set(chip), node.cpu && words.cores(node.cpu.cores_physical), node.slots && words.slots(node.slots)].filter(Boolean).join(" · ")}</p>
      ${node.reason && html`<p class=${`small ${draining ? "quiet-text" : "fault-line"}`}>${node.reason}</p>`}
      ${node.status !== "offline" && html`<div class="meters">
        ${memory.total_gb > 0 && html`<${Meter} label=${words.memory} used=${memory.used_gb * GIB} total=${memory.total_gb * GIB} />`}
        ${hasOwn && html`<${Meter} label=${words.deviceMemory(device.name.toUpperCase())}
          used=${device.memory_total_bytes - (device.memory_free_bytes ?? 0)} total=${device.memory_total_bytes} />`}
        ${node.cpu && html`<${Meter} label=${words.processor} used=${node.cpu.utilization_pct} total=${100} told=${`${Math.round(node.cpu.utilization_pct)} %`} />`}
      </div><${Models} node=${node} rights=${rights} />`}
      <${Running} node=${node} jobs=${jobs} />
    </div>
    ${rights.isRouter && rights.mayManage && html`<${Acts} node=${node} name=${name} draining=${draining} />`}
  </article>`;
}

/** How much of something is used. With words of its own for that, being full is no reason to worry. */
function Meter({ label, used, total, told }) {
  const share = Math.min(1, Math.max(0, used / total));
  return html`<div class="meter-row"><span class="small quiet-text">${label}</span>
    <meter min="0" max="1" ...${told ? {} : { low: 0.85, high: 0.95, optimum: 0 }} value=${share} aria-label=${label}>${Math.round(share * 100)} %</meter>
    <span class="small num">${told ?? words.used(gib(used), gib(total))}</span></div>`;
}

const gib = (n) => (n >= GIB ? `${(n / GIB).toFixed(n < 10 * GIB ? 1 : 0)} GiB` : bytes(n));

function Models({ node, rights }) {
  const image = node.image ?? {};
  const loaded = image.models_loaded ?? [];
  const pinned = new Set(node.pinned ?? []);
  const shown = [...new Set([...loaded, ...pinned])];
  const onDisk = image.models_available?.length ?? 0;
  const turn = async (model) => {
    const verb = pinned.has(model) ? "unpin" : "pin";
    try {
      if (rights.isRouter) await call(`/fleet/nodes/${encodeURIComponent(node.node_id)}/${verb}`, { method: "POST", body: { model } });
      else await call(`/api/models/${model}/${verb}`, { method: "POST" });
      toast(verb === "pin" ? words.isPinned(model) : words.isUnpinned(model), { kind: "good" });
    } catch (fault) {
      toastError(fault);
    }
  };
  return html`<div class="models"><span class="small quiet-text">${words.loaded}</span>
    ${shown.length === 0 && html`<span class="small quiet-text">${words.nothingLoaded}</span>`}
    ${shown.map((model) => html`<span class="chip" key=${model}>${model}
      ${rights.mayManage
        ? html`<button type="button" aria-pressed=${String(pinned.has(model))} title=${pinned.has(model) ? words.unpin(model) : words.pin(model)}
          aria-label=${pinned.has(model) ? words.unpin(model) : words.pin(model)} onClick=${() => turn(model)}><${Icon} name=${pinned.has(model) ? "lock" : "unlock"} /></button>`
        : pinned.has(model) && html`<${Icon} name="lock" title=${words.pinned} />`}</span>`)}
    <span class="small quiet-text end">${words.onDisk(onDisk)}</span></div>`;
}

function Running({ node, jobs }) {
  if (jobs.length === 0) return node.status === "online" && html`<p class="small quiet-text">${words.idle}</p>`;
  return html`<ul class="running">${jobs.slice(0, MAX_SHOWN).map((job) => html`<li key=${job.id}>
      <span class="running-name small"><b>${job.model}</b> ${job.width}×${job.height}${job.n > 1 ? ` × ${job.n}` : ""}</span>
      <span class="small num quiet-text">${words.steps(job.step, job.steps)}${job.eta_s ? ` · ${words.left(job.eta_s)}` : ""}</span>
      <${Progress} share=${job.steps ? job.step / job.steps : null} label=${`${job.model}, ${words.steps(job.step, job.steps)}`} /></li>`)}
    ${jobs.length > MAX_SHOWN && html`<li class="small quiet-text">${words.more(jobs.length - MAX_SHOWN)}</li>`}</ul>`;
}

function Acts({ node, name, draining }) {
  const [isAsking, ask] = useState(false);
  const tell = async (verb, told) => {
    try {
      await call(`/fleet/nodes/${encodeURIComponent(node.node_id)}/${verb}`, { method: "POST", body: {} });
      toast(told, { kind: "good" });
    } catch (fault) {
      toastError(fault);
    }
  };
  return html`<footer class="node-acts">
    ${draining
      ? html`<${Button} class="small" onClick=${() => tell("undrain", words.undrains(name))}>${words.undrain}<//>`
      : html`<${Button} class="small" title=${words.drainWhy} onClick=${() => tell("drain", words.drains(name))}>${words.drain}<//>`}
    <${Button} class="small" kind="danger" onClick=${() => ask(true)}>${words.revoke}<//>
    ${isAsking && html`<${Dialog} title=${words.revokeTitle(name)} onClose=${() => ask(false)} foot=${html`
      <${Button} onClick=${() => ask(false)}>${text.cancel}<//>
      <${Button} kind="danger" onClick=${() => { ask(false); tell("revoke", words.revoked(name)); }}>${words.revoke}<//>`}>
      <p>${words.revokeWhy}</p><//>`}
  </footer>`;
}
