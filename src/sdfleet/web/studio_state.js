// What the studio knows: models, the form, jobs under way, what is looked at. The truth about jobs and pictures is the
// server's; this is a view of it that is drawn again after every reload.

import { ApiError, call, connection, listen, sleep } from "./api.js";
import { text } from "./text.js";
import { createStore, toast, toastError } from "./ui.js";

const OPEN_POLL_MS = 1000;
const IDLE_POLL_MS = 4000;
// A browser has six connections to a server for everything; the other jobs are told of by the poll.
const MAX_STREAMS = 2;
const FORM_KEY = "studio-form";

export const FORM = {
  prompt: "", negative: "", model: "", ratio: "1:1", width: null, height: null, steps: null, guidance: null,
  sampler: "", seed: "", isSeedKept: false, n: 1, strength: null, image: null, mask: null, loras: [],
};

export const studio = createStore({
  cards: [], absent: [], defaultModel: "", samplers: [], fault: null,
  form: { ...FORM, ...kept() },
  errors: {},
  isSending: false,
  jobs: [],          // queued and running, oldest first
  ended: [],         // failed or cancelled while this page was open
  previews: {},      // by job: {index: address of a picture}
  focus: null,       // the job that the stage follows
  shown: null,       // the picture that the stage shows
  newest: 0,         // counts up when the gallery should look for new pictures
  removed: new Set(),
  comparing: null,
  dialog: null,
});

/** The form as it was left, without its pictures. */
function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(FORM_KEY) ?? "{}");
    return Object.fromEntries(Object.entries(found).filter(([name]) => name in FORM && name !== "image" && name !== "mask"));
  } catch {
    return {};
  }
}

/** Change fields of the form; their errors go. */
export function fill(change) {
  studio.set(({ form, errors }) => {
    const next = { ...form, ...change };
    const isSize = "ratio" in change || "width" in change;
    const left = Object.fromEntries(Object.entries(errors).filter(([name]) => !(name in change) && !(name === "size" && isSize)));
    return { form: next, errors: left };
  });
  try {
    const { image, mask, ...rest } = studio.get().form;
    localStorage.setItem(FORM_KEY, JSON.stringify(rest));
  } catch {
    // Storage is full or off: the form is then gone after a reload, and nothing else.
  }
}

/** The card of the model in the form; null while nothing is known. */
export function cardOf({ cards, form, defaultModel }) {
  return cards.find((card) => card.name === form.model) ?? cards.find((card) => card.name === defaultModel) ?? cards[0] ?? null;
}

/** Width and height that a ratio like "3:2" means for a model: its own area, sides of its multiple. */
export function sizeOf(card, ratio) {
  const [across, down] = ratio.split(":").map(Number);
  if (across === down) return [card.width, card.width === card.height ? card.height : card.width];
  const side = (share) => Math.max(card.multiple, Math.round(Math.sqrt(card.area * share) / card.multiple) * card.multiple);
  return [side(across / down), side(down / across)];
}

/** What is asked of the server for this form: the body of POST /api/jobs. */
export function bodyOf(state) {
  const { form } = state;
  const card = cardOf(state);
  const ignored = new Set(card?.ignores ?? []);
  const body = { prompt: form.prompt };
  if (card) body.model = card.name;
  if (form.negative.trim() && !ignored.has("negative_prompt")) body.negative_prompt = form.negative;
  if (form.ratio === "own" && form.width && form.height) Object.assign(body, { width: form.width, height: form.height });
  else if (card && form.ratio !== "image" && form.ratio !== "own") {
    const [width, height] = sizeOf(card, form.ratio);
    Object.assign(body, { width, height });
  }
  if (form.steps !== null) body.steps = form.steps;
  if (form.guidance !== null && !ignored.has("guidance")) body.guidance = form.guidance;
  if (form.sampler) body.sampler = form.sampler;
  // As text: a seed may be longer than a number here is exact.
  if (form.seed !== "") body.seed = form.seed;
  if (form.n !== 1) body.n = form.n;
  if (form.loras.length) body.loras = form.loras;
  if (form.image && !ignored.has("image")) {
    body.image = form.image.url;
    if (form.mask && !ignored.has("mask")) body.mask = form.mask;
    if (form.strength !== null) body.strength = form.strength;
  }
  return body;
}

// Where the form shows the fault of a field; one of any other is shown above the button.
const FIELD_OF = {
  prompt: "prompt", negative_prompt: "negative", width: "size", height: "size", size: "size", steps: "steps", n: "n",
  guidance: "guidance", sampler: "sampler", seed: "seed", image: "image", mask: "mask", strength: "strength",
};
// One key for one press of the button: a repeat after a lost connection joins the job that the first press made.
let pressed = null;

function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Ask for the pictures of the form. */
export async function generate() {
  const state = studio.get();
  if (state.isSending) return;
  if (!state.form.prompt.trim()) {
    studio.set({ errors: { prompt: text.studio.promptMissing } });
    document.getElementById("prompt")?.focus();
    return;
  }
  if (!state.form.isSeedKept && state.form.seed !== "") fill({ seed: "" });
  const body = bodyOf(studio.get());
  const said = JSON.stringify(body);
  if (pressed?.said !== said) pressed = { said, key: newKey() };
  studio.set({ isSending: true, errors: {} });
  try {
    const job = await call("/api/jobs", { method: "POST", body, headers: { "Idempotency-Key": pressed.key } });
    pressed = null;
    studio.set(({ jobs }) => ({ jobs: [...jobs.filter((one) => one.id !== job.id), job], focus: job.id, shown: null }));
    bringIntoView(".stage");
    // Not waited for: the button is free again at once. A fault of it is told at the top of the page.
    look().catch(() => {});
  } catch (fault) {
    // Lost on the way: the same key again asks for the same job. A refusal is final, the next press is a new request.
    if (fault.code !== "unreachable") pressed = null;
    const field = FIELD_OF[fault.field];
    const said = fault.hint ? `${fault.message}: ${fault.hint}` : fault.message;
    studio.set({ errors: field ? { [field]: said } : { form: fault } });
  } finally {
    studio.set({ isSending: false });
  }
}

/** Stop a job before its next step. */
export async function cancel(id) {
  try {
    await call(`/api/jobs/${id}`, { method: "DELETE" });
    await look();
  } catch (fault) {
    toastError(fault);
  }
}

/** Another try of a job that failed. */
export async function retry(id) {
  try {
    const job = await call(`/api/jobs/${id}/retry`, { method: "POST" });
    studio.set(({ ended }) => ({ ended: ended.filter((one) => one.id !== id), focus: job.id, shown: null }));
    await look();
  } catch (fault) {
    toastError(fault);
  }
}

/** Put a job that failed out of sight. */
export function dismiss(id) {
  studio.set(({ ended }) => ({ ended: ended.filter((one) => one.id !== id) }));
}

/** Where the columns stand one under the other, what somebody has just asked for may be far from what they pressed. */
function bringIntoView(selector, block = "start") {
  requestAnimationFrame(() => {
    const there = document.querySelector(selector);
    const { top, bottom } = there.getBoundingClientRect();
    if (block === "nearest" || top < 0 || top > innerHeight / 2 || bottom < 0) there.scrollIntoView({ block, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  });
}

/** Show a picture on the stage. */
export function show(output) {
  const { comparing } = studio.get();
  if (comparing && output && comparing.id !== output.id) {
    studio.set({ comparing: null, dialog: { kind: "compare", pair: [comparing, output] } });
    return;
  }
  studio.set({ shown: output, focus: output ? null : studio.get().focus });
  bringIntoView(".stage");
}

/** Keep a picture as a favourite, or not any more. */
export async function mark(output) {
  const change = { ...output, favourite: !output.favourite };
  changed(change);
  try {
    await call(`/api/outputs/${output.id}/favourite`, { method: change.favourite ? "PUT" : "DELETE" });
  } catch (fault) {
    changed(output);
    toastError(fault);
  }
}

/** Tell everybody who shows a picture that it is another one now; the gallery listens through `onChanged`. */
export const changes = createStore({ output: null });
function changed(output) {
  changes.set({ output });
  if (studio.get().shown?.id === output.id) studio.set({ shown: output });
}

/** Delete a picture for good. */
export async function remove(output) {
  try {
    await call(`/api/outputs/${output.id}`, { method: "DELETE" });
    studio.set(({ removed, shown }) => ({ removed: new Set(removed).add(output.id), shown: shown?.id === output.id ? null : shown }));
    toast(text.studio.deleted);
  } catch (fault) {
    toastError(fault);
  }
}

/** Take over how a picture was made. found: an answer of a metadata route. */
export function likeThis(found, { keepsSeed = true } = {}) {
  if (found.source === "none") {
    toast(text.studio.noMetadata, { hint: text.studio.noMetadataHint });
    return;
  }
  const { cards } = studio.get();
  const isHere = cards.some((card) => card.name === found.model);
  fill({
    prompt: found.prompt, negative: found.negative_prompt, ...(isHere ? { model: found.model } : {}),
    ratio: "own", width: found.width, height: found.height, steps: found.steps, guidance: found.guidance,
    sampler: found.sampler ?? "", seed: keepsSeed && found.seed !== null ? found.seed : "", isSeedKept: keepsSeed && found.seed !== null,
    n: 1, strength: found.strength, loras: found.loras.map(({ text_scale, ...rest }) => (text_scale === null ? rest : { ...rest, text_scale })),
  });
  const hint = ["img2img", "inpaint"].includes(found.task) && !studio.get().form.image ? text.studio.likeInputMissing : "";
  toast(isHere || !found.model ? text.studio.likeDone : text.studio.likeOtherModel(found.model), { kind: "good", hint });
  bringIntoView(".form");
}

/** A picture for the form: from a file, the clipboard, or the gallery. Raises ApiError for what is no picture. */
export async function usePicture(blob, name) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ApiError({ message: text.studio.notReadable(name) }));
    reader.readAsDataURL(blob);
  });
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new ApiError({ message: text.studio.notReadable(name), hint: text.studio.notReadableHint });
  }
  fill({ image: { url, name, width: image.naturalWidth, height: image.naturalHeight }, mask: null, ratio: "image" });
  bringIntoView(".input-picture", "nearest");
}

/** Models and samplers, asked until they are known. */
export async function loadChoices() {
  try {
    const [cards, samplers] = await Promise.all([call("/api/models/cards"), call("/api/samplers")]);
    studio.set({ cards: cards.here, absent: cards.absent, defaultModel: cards.default, samplers: samplers.samplers, fault: null });
    const { form } = studio.get();
    if (!cards.here.some((card) => card.name === form.model)) fill({ model: "" });
  } catch (fault) {
    studio.set({ fault });
  }
}

// ------------------------------------------------------------------------------------------- jobs, as the server has them

let lookingSince = 0;

/** Ask which jobs are open; what was and is no more has ended. */
async function look() {
  const mine = (lookingSince += 1);
  const { jobs: found } = await call("/api/jobs?state=queued&state=running&limit=100");
  // A later question may have been answered first.
  if (mine !== lookingSince) return;
  const open = found.reverse();
  const ids = new Set(open.map((job) => job.id));
  const gone = studio.get().jobs.filter((job) => !ids.has(job.id));
  studio.set(({ jobs }) => ({ jobs: open.map((job) => later(job, jobs.find((one) => one.id === job.id))) }));
  for (const job of gone) await end(await call(`/api/jobs/${job.id}`));
}

/** The one of two answers about a job that knows more. */
function later(job, known) {
  return known && known.attempts === job.attempts && known.progress.step > job.progress.step ? { ...job, progress: known.progress, eta_s: known.eta_s } : job;
}

/** A job has ended: its pictures are in the gallery, its fault is told. */
function end(job) {
  if (job.state === "queued" || job.state === "running") return;
  const { focus } = studio.get();
  studio.set(({ jobs, ended, previews, newest }) => {
    const { [job.id]: _, ...left } = previews;
    return {
      jobs: jobs.filter((one) => one.id !== job.id), previews: left, newest: newest + 1,
      ended: job.state === "failed" ? [job, ...ended.filter((one) => one.id !== job.id)].slice(0, 5) : ended,
    };
  });
  if (focus !== job.id) return;
  const next = studio.get().jobs.at(0)?.id ?? null;
  studio.set({ focus: job.state === "done" ? null : next, shown: job.outputs[0] ?? null });
  for (const warning of job.warnings) toast(warning, { staysMs: 9000 });
}

function update(job) {
  studio.set(({ jobs }) => ({ jobs: jobs.map((one) => (one.id === job.id ? { ...one, ...job } : one)) }));
}

/** Follow the server until the returned function is called. */
export function follow() {
  const stop = new AbortController();
  const streams = new Map();

  const tune = ({ jobs, focus }) => {
    const running = jobs.filter((job) => job.state === "running" || job.id === focus);
    running.sort((a, b) => (b.id === focus) - (a.id === focus));
    const wanted = new Set(running.slice(0, MAX_STREAMS).map((job) => job.id));
    for (const [id, away] of streams) {
      if (wanted.has(id)) continue;
      away();
      streams.delete(id);
    }
    for (const id of wanted) {
      if (!streams.has(id)) streams.set(id, listen(`/api/jobs/${id}/events`, { onEvent: (name, data) => told(id, name, data), onGone: () => {} }));
    }
  };

  const told = (id, name, data) => {
    if (name === "preview") {
      const url = `data:image/png;base64,${data.b64_png}`;
      studio.set(({ previews }) => ({ previews: { ...previews, [id]: { ...previews[id], [data.image_index]: url } } }));
      return undefined;
    }
    if (data.state === "queued" || data.state === "running") return void update(data);
    end(data);
    return "stop";
  };

  const away = studio.subscribe(tune);

  (async () => {
    let turn = 0;
    while (!stop.signal.aborted) {
      if (!document.hidden && !connection.get().wantsKey) {
        try {
          if (!studio.get().cards.length) await loadChoices();
          await look();
          // Others may make pictures too.
          turn += 1;
          if (!studio.get().jobs.length && turn % 2 === 0) studio.set(({ newest }) => ({ newest: newest + 1 }));
        } catch {
          // Said at the top of the page; the next turn asks again.
        }
      }
      const isOpen = studio.get().jobs.length > 0 || connection.get().isLost;
      await sleep(isOpen ? OPEN_POLL_MS : IDLE_POLL_MS, stop.signal);
    }
  })();

  return () => {
    stop.abort();
    away();
    for (const close of streams.values()) close();
  };
}
