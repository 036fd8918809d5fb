// Charts over time, drawn by hand: bars for what ended, lines for how long it took. Each can be read as a table too.

import { text } from "./text.js";
import { html, useEffect, useId, useRef, useState } from "./ui.js";

const HEIGHT = 190;
const EDGE = { left: 52, right: 12, top: 10, bottom: 26 };
const LABEL_EVERY_PX = 90;

/** Milliseconds as a person says them. */
export function span(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 10000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 120000) return `${Math.round(ms / 1000)} s`;
  return `${Math.round(ms / 60000)} min`;
}

/** Round numbers from 0 up to at least `most`, four steps or fewer apart. */
export function ticks(most, { whole = false } = {}) {
  const rough = Math.max(most, whole ? 1 : 1e-9) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 2.5, 5, 10].find((one) => one * power >= rough - 1e-12) * power;
  if (whole) step = Math.max(1, Math.ceil(step));
  const n = Math.max(1, Math.ceil(most / step - 1e-9));
  return Array.from({ length: n + 1 }, (_, i) => i * step);
}

/** The time of day of so many seconds since 1970. */
export const time = (seconds, parts = { second: "2-digit" }) =>
  new Date(seconds * 1000).toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...parts });

function clock(seconds, widthS) {
  const day = widthS >= 7200 ? `${new Date(seconds * 1000).toLocaleDateString("en", { weekday: "short" })} ` : "";
  return day + time(seconds, {});
}

/**
 * One chart. spans: of the series. parts: what is drawn of each, {key, name, kind: "bar" or "line", className}.
 * told: a number as text. Bars stand on each other; a line has gaps where nothing ended.
 */
function Chart({ title, unit, desc, spans, parts, told, whole = false, empty }) {
  const [width, setWidth] = useState(0);
  const [at, setAt] = useState(null);
  const frame = useRef(null);
  const id = useId();

  useEffect(() => {
    const watcher = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    watcher.observe(frame.current);
    return () => watcher.disconnect();
  }, []);

  const bars = parts.filter((part) => part.kind === "bar");
  const lines = parts.filter((part) => part.kind === "line");
  const most = Math.max(0, ...spans.map((one) => Math.max(
    bars.reduce((sum, part) => sum + one[part.key], 0), ...lines.map((part) => one[part.key] ?? 0))));
  const isEmpty = most === 0;
  const marks = ticks(most, { whole });
  const innerWidth = Math.max(1, width - EDGE.left - EDGE.right);
  const innerHeight = HEIGHT - EDGE.top - EDGE.bottom;
  const step = innerWidth / Math.max(1, spans.length);
  const x = (i) => EDGE.left + i * step;
  const y = (value) => EDGE.top + innerHeight * (1 - value / marks.at(-1));
  const labelEvery = Math.max(1, Math.ceil(LABEL_EVERY_PX / step));
  const shown = at === null ? null : spans[at];

  const point = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const i = Math.floor((event.clientX - box.left - EDGE.left) / step);
    setAt(i >= 0 && i < spans.length ? i : null);
  };

  return html`<figure class="chart" aria-labelledby=${`${id}-name`}>
    <figcaption class="chart-head"><h3 id=${`${id}-name`}>${title}</h3><span class="small quiet-text">${unit}</span>
      <ul class="legend">${parts.map((part) => html`<li key=${part.key}><i class=${`key ${part.kind} ${part.className}`}></i>${part.name}</li>`)}</ul>
    </figcaption>
    <div class="chart-frame" ref=${frame}>
      ${width > 0 && html`<svg width=${width} height=${HEIGHT} role="img" aria-labelledby=${`${id}-title ${id}-desc`}
        onPointerMove=${point} onPointerLeave=${() => setAt(null)}>
        <title id=${`${id}-title`}>${title}</title><desc id=${`${id}-desc`}>${isEmpty ? empty : desc}</desc>
        ${marks.map((mark) => html`<g key=${mark} class="tick"><line x1=${EDGE.left} x2=${width - EDGE.right} y1=${y(mark)} y2=${y(mark)} />
          <text x=${EDGE.left - 8} y=${y(mark) + 4} text-anchor="end">${isEmpty && mark ? "" : told(mark)}</text></g>`)}
        ${spans.map((one, i) => i % labelEvery === 0 && x(i) + 40 < width && html`<text key=${one.start} class="time" x=${x(i)} y=${HEIGHT - 8}>${clock(one.start, one.width_s)}</text>`)}
        ${shown && html`<rect class="at" x=${x(at)} y=${EDGE.top} width=${step} height=${innerHeight} />`}
        ${spans.map((one, i) => html`<${Bar} key=${one.start} one=${one} parts=${bars} x=${x(i)} width=${step} y=${y} />`)}
        ${lines.map((part) => html`<${Line} key=${part.key} part=${part} spans=${spans} x=${(i) => x(i) + step / 2} y=${y} />`)}
      </svg>`}
      ${isEmpty && html`<p class="chart-empty quiet-text" aria-hidden="true">${empty}</p>`}
      ${shown && html`<div class="tip" style=${{ left: `${Math.min(x(at) + step, width - 170)}px` }}>
        <p class="small quiet-text">${clock(shown.start, shown.width_s)} – ${clock(shown.start + shown.width_s, shown.width_s)}</p>
        ${parts.map((part) => html`<p key=${part.key}><i class=${`key ${part.kind} ${part.className}`}></i>${part.name}<b class="num">${told(shown[part.key])}</b></p>`)}
      </div>`}
    </div>
    <details class="chart-table"><summary>${text.dashboard.asTable}</summary>
      <div class="table-wrap" tabindex="0" role="group" aria-label=${title}><table class="table"><thead><tr><th scope="col">${text.dashboard.from}</th>
        ${parts.map((part) => html`<th key=${part.key} class="num" scope="col">${part.name}</th>`)}</tr></thead>
        <tbody>${spans.map((one) => html`<tr key=${one.start}><th scope="row">${clock(one.start, one.width_s)}</th>
          ${parts.map((part) => html`<td key=${part.key} class="num">${told(one[part.key])}</td>`)}</tr>`)}</tbody></table></div>
    </details>
  </figure>`;
}

function Bar({ one, parts, x, width, y }) {
  let below = 0;
  const gap = width > 6 ? 2 : width > 3 ? 1 : 0;
  return parts.map((part) => {
    const value = one[part.key];
    if (!value) return null;
    const top = y(below + value);
    const height = y(below) - top;
    below += value;
    return html`<rect class=${part.className} x=${x + gap / 2} y=${top} width=${width - gap} height=${height} rx=${Math.min(2, width / 4)} />`;
  });
}

function Line({ part, spans, x, y }) {
  const runs = [];
  let run = [];
  spans.forEach((one, i) => {
    if (one[part.key] === null) {
      if (run.length) runs.push(run);
      run = [];
    } else run.push([x(i), y(one[part.key])]);
  });
  if (run.length) runs.push(run);
  return runs.map((points) => html`<g key=${points[0][0]} class=${`line ${part.className}`}>
    ${points.length > 1 && html`<path d=${`M${points.map((point) => point.join(" ")).join("L")}`} />`}
    ${(points.length === 1 || spans.length <= 30) && points.map(([px, py]) => html`<circle key=${px} cx=${px} cy=${py} r="2.5" />`)}
  </g>`);
}

/** How much ended in each span, and how long it took. */
export function Charts({ series }) {
  const words = text.dashboard;
  const { spans, whole, window } = series;
  const past = words.pasts[window];
  return html`<div class="charts">
    <${Chart} title=${words.throughput} unit=${words.throughputUnit(words.widths[window])} spans=${spans} whole
      desc=${words.throughputDesc(whole.done, whole.failed, whole.cancelled, past)} empty=${words.nothingEnded(past)}
      told=${(n) => String(n)} parts=${[
        { key: "done", name: words.done, kind: "bar", className: "c-done" },
        { key: "failed", name: words.failed, kind: "bar", className: "c-failed" },
        { key: "cancelled", name: words.cancelled, kind: "bar", className: "c-cancelled" },
      ]} />
    <${Chart} title=${words.latencyTitle} unit=${words.latencyUnit} spans=${spans}
      desc=${words.latencyDesc(span(whole.total_p50_ms), span(whole.total_p95_ms), past)} empty=${words.nothingEnded(past)}
      told=${span} parts=${[
        { key: "total_p50_ms", name: words.median, kind: "line", className: "c-p50" },
        { key: "total_p95_ms", name: words.slow, kind: "line", className: "c-p95" },
      ]} />
  </div>`;
}
