// The dashboard: the machines, what they draw, what waits, how it went, what is wrong.
//
// What moves comes by /dashboard/events, whole with each event, so that nothing piles up here. The rest is asked for
// again when something has ended, not more often than every few seconds, and not while nobody looks.

import { call, listen } from "./api.js";
import { Charts, span, time } from "./dashboard_charts.js";
import { Command, Nodes } from "./dashboard_nodes.js";
import { Requests } from "./dashboard_requests.js";
import { text } from "./text.js";
import { Badge, Button, Fault, Icon, html, toast, toastError, useCallback, useEffect, useRef, useState } from "./ui.js";

const words = text.dashboard;
const WINDOWS = ["15m", "1h", "6h", "24h", "7d"];
const REFRESH_MS = 4000;
const AT_LEAST_EVERY_MS = 30000;
const HEALTH_EVERY_MS = 60000;
const N_TRACES = 60;

export default function Dashboard() {
  const [now, setNow] = useState(null);
  const [state, setState] = useState("connecting");
  const [fault, setFault] = useState(null);
  const [settings, setSettings] = useState(null);
  const [window_, setWindow] = useState("1h");
  const [shown, show] = useState(null);
  const isVisible = useVisible();

  useEffect(() => {
    if (!isVisible) return undefined;
    return listen("/dashboard/events", {
      onEvent: (name, data) => { if (name === "message") { setNow(data); setFault(null); } },
      onGone: setFault,
      onState: setState,
    });
  }, [isVisible]);

  const look = useCallback(() => call("/dashboard/api/settings").then(setSettings, () => {}), []);
  useEffect(() => { look(); }, [state === "live"]);

  const may = new Set(settings?.may ?? []);
  const rights = { mayManage: may.has("manage"), mayGenerate: may.has("generate"), isRouter: settings?.is_router ?? false };
  const queues = Object.values(now?.queues ?? {});
  // Changes whenever something was taken, begun or ended.
  const pulse = queues.reduce((sum, queue) => sum + 3 * queue.completed + 5 * queue.failed + queue.pending + queue.in_flight, 0);
  const [series, askSeries] = useAsked(`/dashboard/api/series?window=${window_}`, pulse, isVisible);
  const [traces, askTraces] = useAsked(`/dashboard/api/traces?limit=${N_TRACES}`, pulse, isVisible);
  const [health] = useAsked("/dashboard/api/health", 0, isVisible, HEALTH_EVERY_MS);
  const [pending, askPending] = useAsked(rights.isRouter && rights.mayManage ? "/fleet/pending" : null, now?.nodes?.length ?? 0, isVisible, REFRESH_MS);

  if (fault) return html`<div class="page"><h1>${words.heading}</h1><${Fault} error=${fault} /></div>`;
  return html`<div class="page">
    <header class="page-head"><h1>${words.heading}</h1><${Live} state=${state} has=${now !== null} />
      ${settings && html`<${Switch} settings=${settings} mayManage=${rights.mayManage} onChange=${look} />`}</header>
    ${settings && !settings.config.toggles.image_generation && html`<div class="notice warn" role="status"><${Icon} name="warn" /><span>${words.takesOff}</span></div>`}
    <${Tiles} now=${now} series=${series} window_=${window_} />
    <${Health} health=${health} />
    ${now && html`<${Nodes} nodes=${now.nodes} jobs=${now.jobs ?? []} rights=${rights} pending=${pendingOf(pending)} onAsk=${askPending} />
      <${Queues} queues=${queues} nodes=${now.nodes} />`}
    <section aria-labelledby="time-title"><div class="section-head"><h2 id="time-title">${words.overTime}</h2>
      <div class="segments" role="group" aria-label=${words.window}>${WINDOWS.map((name) => html`<button type="button" key=${name}
        aria-pressed=${String(window_ === name)} onClick=${() => setWindow(name)}>${words.windows[name]}</button>`)}</div></div>
      <div class="card card-body">${series ? html`<${Charts} series=${series} />` : html`<p class="loading">${text.loading}</p>`}</div></section>
    ${series && html`<${Failures} series=${series} show=${show} traces=${traces?.traces ?? []} />`}
    ${traces && html`<${Requests} traces=${traces.traces} rights=${rights} shown=${shown} show=${show}
      onChange=${() => { askTraces(); askSeries(); }} />`}
  </div>`;
}

const pendingOf = (told) => (Array.isArray(told) ? told : told?.pending ?? []);

/** Whether the page is looked at; a tab in the background costs the server nothing. */
function useVisible() {
  const [isVisible, set] = useState(!document.hidden);
  useEffect(() => {
    const onChange = () => set(!document.hidden);
    document.addEventListener("visibilitychange", onChange);
    return () => document.removeEventListener("visibilitychange", onChange);
  }, []);
  return isVisible;
}

/** The answer of a route, asked again when `pulse` changes (every few seconds at most) and now and then; and how to ask at once. */
function useAsked(path, pulse, isVisible, everyMs = AT_LEAST_EVERY_MS) {
  const [answer, setAnswer] = useState(null);
  const soon = useRef(() => {});

  useEffect(() => {
    if (!path || !isVisible) return undefined;
    const away = new AbortController();
    let timer = 0;
    let isAsking = false;
    // The server's answer may be some seconds old: what has just ended is in the next one for certain.
    let nLeft = 0;
    let askedMs = -Infinity;
    const after = (ms) => { clearTimeout(timer); timer = setTimeout(ask, ms); };
    const ask = async () => {
      isAsking = true;
      nLeft -= 1;
      askedMs = performance.now();
      try {
        setAnswer(await call(path, { signal: away.signal }));
      } catch {
        // The line at the top says it when the server is away; a key that may not read is told by the events.
      }
      isAsking = false;
      if (!away.signal.aborted) after(nLeft > 0 ? REFRESH_MS : everyMs);
    };
    soon.current = (isAtOnce) => {
      nLeft = 2;
      if (!isAsking) after(isAtOnce ? 0 : Math.max(0, askedMs + REFRESH_MS - performance.now()));
    };
    ask();
    return () => { clearTimeout(timer); away.abort(); soon.current = () => {}; };
  }, [path, isVisible]);

  useEffect(() => soon.current(false), [pulse]);
  return [answer, () => soon.current(true)];
}

function Live({ state, has }) {
  const [kind, told] = state === "live" && has ? ["good", words.live] : state === "lost" ? ["warn", words.resuming] : ["plain", words.connecting];
  return html`<span role="status" class="live"><${Badge} kind=${kind}><i class=${`dot ${kind}`} aria-hidden="true"></i>${told}<//></span>`;
}

function Switch({ settings, mayManage, onChange }) {
  const [isBusy, setBusy] = useState(false);
  const isOn = settings.config.toggles.image_generation;
  const turn = async () => {
    setBusy(true);
    try {
      await call("/dashboard/api/settings", { method: "POST", body: { image_generation: !isOn } });
      await onChange();
      toast(isOn ? words.switchedOff : words.switchedOn, { kind: "good" });
    } catch (fault) {
      toastError(fault);
    }
    setBusy(false);
  };
  return html`<div class="switch-row"><span id="takes" class="small" title=${words.takesHint}>${words.takes}</span>
    <button type="button" class="switch" role="switch" aria-checked=${String(isOn)} aria-labelledby="takes" disabled=${!mayManage || isBusy} onClick=${turn}><i></i></button></div>`;
}

function Tiles({ now, series, window_ }) {
  const load = now?.load;
  const whole = series?.whole;
  const past = words.pasts[window_];
  const ended = whole ? whole.done + whole.failed : 0;
  const fleet = now?.fleet;
  const isShort = fleet && fleet.nodes_online < fleet.nodes_total;
  return html`<section class="tiles" aria-label=${words.tiles}>
    <${Tile} name=${words.nodesOnline} value=${fleet ? `${fleet.nodes_online}/${fleet.nodes_total}` : "–"} kind=${isShort ? "warn" : ""} />
    <${Tile} name=${words.drawing} value=${load?.running ?? "–"} />
    <${Tile} name=${words.waiting} value=${load?.queued ?? "–"} aside=${!load ? "" : load.queued === 0 ? words.nothingWaits : load.wait_ms === null ? "" : words.emptyIn(load.wait_ms / 1000)} />
    <${Tile} name=${words.doneIn(past)} value=${whole?.done ?? "–"} aside=${whole?.done ? words.perMinute((whole.done / (whole.width_s / 60)).toPrecision(2)) : ""} />
    <${Tile} name=${words.latency} value=${whole ? span(whole.total_p50_ms) : "–"} aside=${whole?.done ? words.p95(span(whole.total_p95_ms)) : ""} />
    <${Tile} name=${words.failed} value=${whole?.failed ?? "–"} kind=${whole?.failed ? "bad" : ""} aside=${whole?.failed ? words.ofAll(`${((100 * whole.failed) / ended).toPrecision(2)} %`) : words.none} />
  </section>`;
}

function Tile({ name, value, aside = "", kind = "" }) {
  return html`<div class=${`card tile ${kind}`}><p class="small quiet-text">${name}</p><p class="tile-value num">${value}</p><p class="small quiet-text tile-aside">${aside}</p></div>`;
}

function Health({ health }) {
  if (!health) return null;
  const bad = health.recommendations.filter((one) => one.severity !== "info");
  const notes = health.recommendations.filter((one) => one.severity === "info");
  return html`<section aria-labelledby="health-title"><div class="section-head"><h2 id="health-title">${words.health}</h2>
      <span class="small quiet-text">${words.checked(Math.max(1, Date.now() / 1000 - health.checked_at))}</span></div>
    ${bad.length === 0 && html`<p class="notice good"><${Icon} name="check" /><span>${words.allWell}</span></p>`}
    <div class="stack-s">${bad.map((one) => html`<${Finding} key=${one.check_id + one.description} one=${one} />`)}
    ${notes.length > 0 && html`<details class="notes"><summary>${words.notes(notes.length)}</summary><div class="stack-s">
      ${notes.map((one) => html`<${Finding} key=${one.check_id + one.description} one=${one} />`)}</div></details>`}</div>
  </section>`;
}

function Finding({ one }) {
  const kind = { critical: "bad", warning: "warn" }[one.severity] ?? "plain";
  return html`<article class=${`card finding ${kind}`}><div class="row"><${Badge} kind=${kind}>${words.severity[one.severity]}<//><h3>${one.title}</h3><span class="small quiet-text">${one.node_id}</span></div>
    <p>${one.description}</p>${one.fix && html`<p class="small quiet-text">${words.mends}</p><${Command} command=${one.fix} />`}</article>`;
}

const COUNTS = ["pending", "in_flight", "completed", "failed"];

/** One line for each model: what waits in a fleet waits at the router, and is nobody's yet. */
function byModel(queues, nodes) {
  const nameOf = new Map(nodes.map((node) => [node.node_id, node.name || node.node_id]));
  const lines = new Map();
  for (const queue of queues) {
    const key = `${queue.request_type}:${queue.model}`;
    const line = lines.get(key) ?? { key, kind: queue.request_type, model: queue.model.replace(/:latest$/, ""), drawnBy: [], totalMs: 0, ...Object.fromEntries(COUNTS.map((count) => [count, 0])) };
    for (const count of COUNTS) line[count] += queue[count];
    if (queue.completed) {
      line.drawnBy.push(words.drewSoMany(nameOf.get(queue.node_id) ?? queue.node_id, queue.completed));
      line.totalMs += queue.completed * queue.avg_latency_ms;
    }
    lines.set(key, line);
  }
  return [...lines.values()].sort((a, b) => (a.model < b.model ? -1 : 1));
}

function Queues({ queues, nodes }) {
  const lines = byModel(queues, nodes);
  return html`<section aria-labelledby="queues-title"><div class="section-head"><h2 id="queues-title">${words.queues}</h2><span class="small quiet-text">${words.queuesHint}</span></div>
    <div class="card table-wrap" tabindex="0" role="group" aria-labelledby="queues-title">
    ${lines.length === 0 ? html`<p class="empty">${words.noQueues}</p>` : html`<table class="table"><thead><tr><th scope="col">${words.model}</th>
      <th scope="col" class="num">${words.waiting}</th><th scope="col" class="num">${words.states.running}</th><th scope="col" class="num">${words.done}</th>
      <th scope="col" class="num">${words.failed}</th><th scope="col" class="minor">${words.drawnBy}</th><th scope="col" class="num minor">${words.average}</th></tr></thead>
      <tbody>${lines.map((line) => html`<tr key=${line.key}>
        <th scope="row"><span class="queue-name"><${Badge} kind="accent">${words.kinds[line.kind] ?? `[${line.kind.toUpperCase()}]`}<//>${line.model}</span></th>
        <td class="num">${line.pending}</td><td class="num">${line.in_flight}</td><td class="num">${line.completed}</td>
        <td class=${`num ${line.failed ? "is-bad" : ""}`}>${line.failed}</td><td class="minor">${line.drawnBy.join(", ") || "–"}</td>
        <td class="num minor">${line.completed ? span(line.totalMs / line.completed) : "–"}</td></tr>`)}</tbody></table>`}
    </div></section>`;
}

function Failures({ series, show, traces }) {
  const past = words.pasts[series.window];
  const known = new Set(traces.map((one) => one.request_id));
  return html`<section aria-labelledby="failures-title"><div class="section-head"><h2 id="failures-title">${words.failures}</h2><span class="small quiet-text">${words.failuresHint(past)}</span></div>
    <div class="card table-wrap" tabindex="0" role="group" aria-labelledby="failures-title">
    ${series.failures.length === 0 ? html`<p class="empty">${words.noFailures(past)}</p>` : html`<table class="table"><thead><tr><th scope="col" class="num">${words.count}</th>
      <th scope="col">${words.reason}</th><th scope="col" class="minor">${words.model}</th><th scope="col">${words.last}</th></tr></thead>
      <tbody>${series.failures.map((one) => html`<tr key=${one.code}><td class="num">${one.count}</td>
        <td><code>${one.code}</code><p>${one.message}</p>${one.hint && html`<p class="hint">${one.hint}</p>`}</td><td class="minor">${one.model}</td>
        <td class="nowrap">${known.has(one.job_id) ? html`<button type="button" class="link" aria-label=${words.open(time(one.last), one.job_id)} onClick=${() => show(one.job_id)}>${time(one.last)}</button>` : time(one.last)}</td></tr>`)}</tbody></table>`}
    </div></section>`;
}
