// The middle: the picture in the making or the one that is looked at, and everything that waits beside it.

import { call } from "./api.js";
import { may } from "./app.js";
import { duration, text } from "./text.js";
import { Badge, Button, Fault, Icon, Progress, html, toastError, useEffect, useState, useStore } from "./ui.js";
import { cancel, changes, dismiss, fill, likeThis, mark, remove, retry, studio, usePicture } from "./studio_state.js";
import { step } from "./studio_gallery.js";

const t = text.studio;

export function Stage() {
  const { jobs, ended, focus, shown, previews, cards } = useStore(studio);
  const job = shown ? null : jobs.find((one) => one.id === focus) ?? null;
  useEffect(() => {
    const onKeyDown = (event) => {
      if (event.target.closest("input, textarea, select, dialog") || event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "ArrowRight") step(1);
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", onKeyDown);
    return () => removeEventListener("keydown", onKeyDown);
  }, []);
  return html`<section class="stage" aria-label=${t.stage}>
    <p class="visually-hidden" role="status">${job ? t.progressSaid(job) : jobs.length ? t.openJobs(jobs.length) : ""}</p>
    ${ended.map((one) => html`<${Failed} key=${one.id} job=${one} />`)}
    ${jobs.length > 0 && (jobs.length > 1 || !job) && html`<${Queue} jobs=${jobs} focus=${job?.id} previews=${previews} />`}
    ${shown ? html`<${Picture} key=${shown.id} output=${shown} />` : job ? html`<${Making} job=${job} previews=${previews[job.id]} />` : cards.length > 0 && html`<${Empty} />`}
  </section>`;
}

function Empty() {
  return html`<div class="empty card"><${Icon} name="wand" /><h1>${t.emptyTitle}</h1><p>${t.emptyText}</p>
    <div class="row samples">${t.samples.map((sample) => html`<button type="button" class="chip" key=${sample} onClick=${() => { fill({ prompt: sample }); document.getElementById("prompt")?.focus(); }}>${sample}</button>`)}</div>
  </div>`;
}

function Failed({ job }) {
  return html`<${Fault} error=${{ message: t.failed(job.error?.message ?? job.error?.code ?? ""), hint: job.error?.hint }}>
    <${Button} class="small" onClick=${() => retry(job.id)}>${t.tryAgain}<//>
    <${Button} class="small" onClick=${() => { likeThis({ ...job, source: "sdfleet", negative_prompt: job.negative_prompt, seed: String(job.seed) }); dismiss(job.id); }}>${t.changeIt}<//>
    <${Button} kind="quiet" class="small" onClick=${() => dismiss(job.id)}>${t.dismiss}<//><//>`;
}

/** What a job is at, in one line. */
function standing(job) {
  if (job.state === "queued") return t.queued(job.queue_position, job.eta_s === null ? "" : duration(job.eta_s));
  return t.running(job.progress.step, job.progress.steps, job.eta_s === null ? "" : duration(job.eta_s));
}

const shareOf = (job) => (job.progress.steps ? job.progress.step / job.progress.steps : 0);

function Queue({ jobs, focus, previews }) {
  return html`<ul class="queue" aria-label=${t.openJobs(jobs.length)}>${jobs.map((job) => html`<li key=${job.id} class=${`card ${job.id === focus ? "is-focus" : ""}`}>
    <button type="button" class="queue-open" onClick=${() => studio.set({ focus: job.id, shown: null })}>
      ${Object.values(previews[job.id] ?? {})[0] ? html`<img src=${Object.values(previews[job.id])[0]} alt="" />` : html`<span class="queue-blank"><${Icon} name="image" /></span>`}
      <span class="grow"><span class="ellipsis">${job.prompt}</span><span class="hint num">${standing(job)}</span>
        <${Progress} share=${shareOf(job)} label=${t.progress} /></span></button>
    ${may("generate") && html`<${Button} kind="quiet" class="small" icon="close" label=${t.cancelJob(job.prompt)} onClick=${() => cancel(job.id)} />`}
  </li>`)}</ul>`;
}

/** Several pictures in as square a sheet as they make. */
function sheetOf(n) {
  const columns = Math.ceil(Math.sqrt(n));
  return { gridTemplateColumns: `repeat(${columns}, minmax(0, 1fr))`, "--rows": Math.ceil(n / columns) };
}

function Making({ job, previews }) {
  const places = Array.from({ length: job.n }, (_, index) => previews?.[index] ?? null);
  return html`<div class="card viewer">
    <div class=${`canvas ${job.n > 1 ? "several" : ""}`} style=${job.n > 1 ? sheetOf(job.n) : {}}>${places.map((url, index) => html`<div key=${index} class=${`frame ${url ? "" : "waiting"}`} style=${{ aspectRatio: `${job.width} / ${job.height}` }}>
      ${url ? html`<img class="preview" src=${url} alt=${t.previewAlt(index + 1)} />` : html`<${Icon} name="image" />`}</div>`)}</div>
    <div class="viewer-foot">
      <${Progress} share=${job.state === "queued" ? undefined : shareOf(job)} label=${t.progress} />
      <div class="row"><span class="num grow" data-testid="standing">${standing(job)}</span>
        ${may("generate") && html`<${Button} onClick=${() => cancel(job.id)}>${t.cancelThis}<//>`}</div>
      <p class="quiet-text prompt-line">${job.prompt}</p>
    </div></div>`;
}

function Picture({ output }) {
  const [made, setMade] = useState(null);
  const [isSure, setSure] = useState(false);
  const { output: change } = useStore(changes);
  const picture = change?.id === output.id ? change : output;
  const [isGone, setGone] = useState(false);
  useEffect(() => {
    const stop = new AbortController();
    call(`/api/outputs/${output.id}/metadata`, { signal: stop.signal }).then(setMade, () => {});
    return () => stop.abort();
  }, [output.id]);
  useEffect(() => {
    if (!isSure) return undefined;
    const timer = setTimeout(() => setSure(false), 4000);
    return () => clearTimeout(timer);
  }, [isSure]);
  const take = async (then) => {
    try {
      await usePicture(await call(output.url, { as: "blob" }), t.fromGallery);
      if (made && made.source !== "none" && !studio.get().form.prompt) fill({ prompt: made.prompt });
      then?.();
    } catch (fault) {
      toastError(fault);
    }
  };
  const isOwner = may("generate");
  return html`<figure class="card viewer">
    <div class="canvas">
      <${Button} kind="quiet" class="turn before" icon="left" label=${t.newer} onClick=${() => step(-1)} />
      <div class="frame" style=${{ aspectRatio: `${output.width} / ${output.height}`, maxWidth: `max(${Math.min(output.width * 4, 1024)}px, 40%)` }}>
        ${isGone ? html`<p class="told">${t.fileGone}</p>` : html`<img class="finished" src=${output.url} alt=${output.prompt || t.pictureAlt(output.seed)} onError=${() => setGone(true)}
          draggable="true" onDragStart=${(event) => event.dataTransfer.setData("text/x-sdfleet-output", output.url)} />`}</div>
      <${Button} kind="quiet" class="turn after" icon="right" label=${t.older} onClick=${() => step(1)} />
    </div>
    <figcaption class="viewer-foot">
      <div class="row actions" role="group" aria-label=${t.actions}>
                <${Button} icon="wand" disabled=${!made || made.source === "none"} onClick=${() => likeThis(made)}>${t.like}<//>
        <${Button} icon="image" onClick=${() => take()}>${t.useAsInput}<//>
        <${Button} icon="brush" onClick=${() => take(() => studio.set({ dialog: { kind: "mask" } }))}>${t.inpaint}<//>
        <span class="actions-end">
        <${Button} icon="star" filled=${picture.favourite} pressed=${picture.favourite} disabled=${!isOwner} label=${picture.favourite ? t.unmark : t.mark} onClick=${() => mark(picture)} />
        <${Button} icon="compare" label=${t.compare} pressed=${false} onClick=${() => studio.set({ comparing: output })} />
        <a class="button plain icon-only" href=${output.url} download=${`${output.id}.${output.format === "jpeg" ? "jpg" : output.format}`} aria-label=${t.download} title=${t.download}><${Icon} name="download" /></a>
        <${Button} icon="copy" label=${t.copyAsCode} disabled=${!made || made.source === "none"} onClick=${() => studio.set({ dialog: { kind: "code", body: bodyFrom(made) } })} />
        <${Button} kind=${isSure ? "danger" : "plain"} icon="trash" label=${isSure ? undefined : t.delete} disabled=${!isOwner}
          onClick=${() => (isSure ? remove(output) : setSure(true))}>${isSure ? t.deleteSure : undefined}<//></span>
      </div>
      ${made && made.source !== "none" && html`<p class="prompt-line">${made.prompt}</p>
        ${made.negative_prompt && html`<p class="quiet-text small prompt-line">${t.negativeShort} ${made.negative_prompt}</p>`}
        <dl class="facts-list num">${t.facts(made, output).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
        ${made.warnings.length > 0 && html`<details class="small"><summary>${t.warnings(made.warnings.length)}</summary><ul>${made.warnings.map((line) => html`<li key=${line}>${line}</li>`)}</ul></details>`}`}
      ${output.safety === "flagged" && html`<${Badge} kind="warn">${t.flagged}<//>`}
    </figcaption></figure>`;
}

/** The request that draws a finished picture again. */
function bodyFrom(made) {
  const body = { model: made.model, prompt: made.prompt };
  if (made.negative_prompt) body.negative_prompt = made.negative_prompt;
  for (const name of ["width", "height", "steps", "guidance", "sampler"]) if (made[name] !== null) body[name] = made[name];
  if (made.seed !== null) body.seed = BigInt(made.seed) <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(made.seed) : made.seed;
  if (made.loras.length) body.loras = made.loras;
  return body;
}

