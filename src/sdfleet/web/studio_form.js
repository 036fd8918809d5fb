// What is asked for. A control that the model ignores is off and says why.

import { call } from "./api.js";
import { may } from "./app.js";
import { text } from "./text.js";
import { Badge, Button, Fault, Field, Icon, NumberInput, html, toast, toastError, useEffect, useRef, useState, useStore } from "./ui.js";
import { bodyOf, cardOf, FORM, fill, generate, likeThis, sizeOf, studio, usePicture } from "./studio_state.js";

const t = text.studio;
const RATIOS = ["1:1", "4:3", "3:2", "16:9", "3:4", "2:3", "9:16"];
const TOKENS_AFTER_MS = 300;

export function Form() {
  const state = useStore(studio);
  const { form, errors, isSending, fault } = state;
  const card = cardOf(state);
  const ignored = new Set(card?.ignores ?? []);
  const why = (name) => (ignored.has(name) ? t.ignored[name](card.title) : "");
  const guidance = form.guidance ?? card?.guidance ?? 0;
  const [tokens, tokenFault] = useTokens(form, card);
  usePictures();

  const submit = (event) => {
    event.preventDefault();
    generate();
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  };

  return html`<form class="form card" onSubmit=${submit} onKeyDown=${onKeyDown} aria-label=${t.form} noValidate>
    <div class="form-scroll">
      ${fault && html`<${Fault} error=${fault} />`}
      <${Field} id="prompt" label=${t.prompt} error=${errors.prompt ?? tokenFault.prompt} aside=${html`<${Tokens} counts=${tokens.prompt} />`}>
        ${(ids) => html`<textarea ...${ids} class="textarea prompt" rows="3" placeholder=${t.promptPlaceholder}
          value=${form.prompt} onInput=${(event) => fill({ prompt: event.target.value })} />`}<//>
      <${Field} label=${t.negative} why=${why("negative_prompt")} error=${errors.negative ?? tokenFault.negative_prompt}
        hint=${form.negative.trim() && guidance <= 1 ? t.negativeNoEffect : ""}
        aside=${!ignored.has("negative_prompt") && html`<${Tokens} counts=${tokens.negative_prompt} />`}>
        ${(ids) => html`<textarea ...${ids} class="textarea" rows="2" placeholder=${t.negativePlaceholder}
          value=${form.negative} onInput=${(event) => fill({ negative: event.target.value })} />`}<//>
      <${Model} state=${state} card=${card} />
      ${card && html`<${Size} form=${form} card=${card} error=${errors.size} />`}
      ${card && html`<div class="pair">
        <${Slider} label=${t.steps} name="steps" min=${1} max=${Math.max(60, card.steps, form.steps ?? 0)} step=${1} value=${form.steps} fallback=${card.steps} error=${errors.steps} />
        <${Slider} label=${t.guidance} name="guidance" min=${0} max=${Math.max(15, form.guidance ?? 0)} step=${0.5} value=${form.guidance} fallback=${card.guidance}
          why=${why("guidance")} error=${errors.guidance} />
      </div>
      <div class="pair wide-first">
        <${Field} label=${t.sampler} error=${errors.sampler}>
          ${(ids) => html`<select ...${ids} class="select" value=${form.sampler} title=${labelOf(state, form.sampler || card.sampler)} onChange=${(event) => fill({ sampler: event.target.value })}>
            <option value="">${t.samplerOfModel(labelOf(state, card.sampler))}</option>
            ${state.samplers.map(({ name, label }) => html`<option key=${name} value=${name}>${label}</option>`)}
          </select>`}<//>
        <${Slider} label=${t.count} name="n" min=${1} max=${8} step=${1} value=${form.n} fallback=${1} error=${errors.n} />
      </div>`}
      <${Seed} form=${form} error=${errors.seed} />
      ${form.loras.length > 0 && html`<div class="row loras"><span class="label">${t.loras}</span>${form.loras.map((lora) => html`
        <span class="chip" key=${lora.name}>${lora.name} ${lora.scale}
          <${Button} kind="quiet" class="small" icon="close" label=${t.removeLora(lora.name)} onClick=${() => fill({ loras: form.loras.filter((one) => one !== lora) })} /></span>`)}</div>`}
      <${Input} form=${form} why=${why("image")} whyMask=${why("mask")} card=${card} errors=${errors} />
    </div>
    <div class="form-foot">
      ${errors.form && html`<${Fault} error=${errors.form}><${FormActs} error=${errors.form} card=${card} /><//>`}
      <div class="row">
        <button type="submit" class="button primary grow big" title=${t.shortcut} aria-keyshortcuts="Control+Enter" disabled=${isSending || !card || !may("generate")}>
          <${Icon} name="wand" />${isSending ? t.sending : form.n > 1 ? t.generateMany(form.n) : t.generate}</button>
        <${Button} icon="copy" label=${t.copyAsCode} onClick=${() => studio.set({ dialog: { kind: "code", body: bodyOf(studio.get()) } })} />
        <${Button} icon="again" label=${t.reset} onClick=${() => fill({ ...FORM, prompt: form.prompt, model: form.model })} />
      </div>
      ${!may("generate") && html`<p class="hint">${t.mayNotGenerate}</p>`}
    </div>
  </form>`;
}

function FormActs({ error, card }) {
  if (error.code === "unreachable" || error.status === 429) return html`<${Button} class="small" onClick=${generate}>${t.tryAgain}<//>`;
  if (error.code.startsWith("checkpoint") && card) return html`<${Button} class="small" onClick=${() => studio.set({ dialog: { kind: "pull", name: card.name } })}>${t.getModel}<//>`;
  return null;
}

const labelOf = (state, name) => state.samplers.find((one) => one.name === name)?.label ?? name;

/** How long the prompts are, some time after the last key. */
function useTokens(form, card) {
  const [counts, setCounts] = useState({ prompt: [], negative_prompt: [] });
  const [fault, setFault] = useState({});
  useEffect(() => {
    if (!card) return undefined;
    const stop = new AbortController();
    const timer = setTimeout(async () => {
      try {
        const body = { model: card.name, prompt: form.prompt, negative_prompt: form.negative };
        setCounts(await call("/api/tokens", { method: "POST", body, signal: stop.signal }));
        setFault({});
      } catch (error) {
        if (!stop.signal.aborted && error.field) setFault({ [error.field]: error.message });
      }
    }, TOKENS_AFTER_MS);
    return () => { clearTimeout(timer); stop.abort(); };
  }, [form.prompt, form.negative, card?.name]);
  return [counts, fault];
}

function Tokens({ counts }) {
  return html`<span class="tokens num">${counts.map(({ encoder, tokens, window, chunks }) => html`
    <span key=${encoder} class=${chunks > 1 ? "over" : ""} title=${t.tokensTitle(encoder, tokens, window, chunks)}>
      ${counts.length > 1 || encoder !== "clip" ? `${t.encoders[encoder] ?? encoder} ` : ""}${tokens}/${window * chunks}${counts.length > 1 ? "" : ` ${t.tokens}`}</span>`)}</span>`;
}

function Model({ state, card }) {
  const { cards, absent } = state;
  const choose = (event) => {
    const name = event.target.value;
    if (absent.some((one) => one.name === name)) {
      event.target.value = card?.name ?? "";
      studio.set({ dialog: { kind: "pull", name } });
      return;
    }
    // What was chosen for one model is seldom right for another: its own steps, guidance and sampler again.
    fill({ model: name, steps: null, guidance: null, sampler: "" });
  };
  return html`<${Field} label=${t.model} aside=${absent.length > 0 && html`<button type="button" class="link" onClick=${() => studio.set({ dialog: { kind: "models" } })}>${t.moreModels}</button>`}>
    ${(ids) => html`<select ...${ids} class="select" value=${card?.name ?? ""} onChange=${choose}>
      <optgroup label=${t.here}>${cards.map((one) => html`<option key=${one.name} value=${one.name}>${one.title}</option>`)}</optgroup>
      ${may("manage") && absent.length > 0 && html`<optgroup label=${t.absent}>${absent.map((one) => html`<option key=${one.name} value=${one.name}>${one.title} …</option>`)}</optgroup>`}
    </select>
    ${card && html`<div class="row facts"><${Badge} kind="accent">${card.family_title}<//><${Badge}>${card.width} × ${card.height}<//>
      <${Badge}>${t.nSteps(card.steps)}<//>${card.licence && html`<${Badge}>${card.licence}<//>`}
      ${!card.ignores.includes("image") && html`<${Badge}>${t.canInpaint}<//>`}</div>`}`}<//>`;
}

function Size({ form, card, error }) {
  const [width, height] = form.ratio === "own" ? [form.width, form.height]
    : form.ratio === "image" && form.image ? [form.image.width, form.image.height] : sizeOf(card, form.ratio === "image" ? "1:1" : form.ratio);
  const side = (name) => (px) => fill({ ratio: "own", width, height, [name]: px });
  const ratios = form.image ? ["image", ...RATIOS] : RATIOS;
  const isOdd = [width, height].some((px) => px && px % card.multiple);
  const isResized = card.resizes && [width, height].some((px) => px < card.min_side || px > card.max_side);
  const told = error ?? (form.ratio === "own" && isOdd ? t.multiple(card.multiple) : isResized ? t.resized(card.title, card.min_side, card.max_side) : "");
  return html`<fieldset class="field plain-set" aria-describedby="size-told">
    <legend class="label">${t.size}</legend>
    <div class="ratios" role="group">${ratios.map((ratio) => html`<button type="button" key=${ratio} class="ratio" aria-pressed=${String(form.ratio === ratio)}
        onClick=${() => fill({ ratio, width: null, height: null })}>
        ${ratio === "image" ? html`<${Icon} name="image" />` : html`<${Shape} ratio=${ratio} />`}<span>${ratio === "image" ? t.asImage : ratio}</span></button>`)}</div>
    <div class="row sides">
      <${NumberInput} inputmode="numeric" aria-label=${t.width} min="16" max="4096" step=${card.multiple} value=${width} onNumber=${side("width")} />
      <${Button} kind="quiet" icon="swap" label=${t.swap} onClick=${() => fill({ ratio: "own", width: height, height: width })} />
      <${NumberInput} inputmode="numeric" aria-label=${t.height} min="16" max="4096" step=${card.multiple} value=${height} onNumber=${side("height")} />
    </div>
    <p class=${error ? "told error" : "told"} id="size-told">${told}</p>
  </fieldset>`;
}

function Shape({ ratio }) {
  const [across, down] = ratio.split(":").map(Number);
  const scale = 14 / Math.max(across, down);
  const [width, height] = [across * scale, down * scale];
  return html`<svg class="shape" viewBox="0 0 16 16" aria-hidden="true"><rect x=${8 - width / 2} y=${8 - height / 2} width=${width} height=${height} rx="1.5"
    fill="none" stroke="currentColor" stroke-width="1.5" /></svg>`;
}

/** A number by slider or by typing; empty means the model's own. */
function Slider({ label, name, min, max, step, value, fallback, why, error }) {
  const shown = value ?? fallback;
  const set = (number) => fill({ [name]: number === null && name === "n" ? 1 : number });
  return html`<${Field} label=${label} why=${why} error=${error}>${(ids) => html`<div class="slider">
    <input type="range" min=${min} max=${max} step=${step} value=${shown} disabled=${ids.disabled} aria-label=${t.slider(label)} onInput=${(event) => set(Number(event.target.value))} />
    <${NumberInput} ...${ids} inputmode="decimal" min=${min} step=${step === 1 ? 1 : "any"} value=${shown} onNumber=${set} /></div>`}<//>`;
}

function Seed({ form, error }) {
  const dice = () => fill({ seed: String(crypto.getRandomValues(new Uint32Array(1))[0]), isSeedKept: true });
  return html`<${Field} label=${t.seed} error=${error} hint=${form.isSeedKept && form.seed !== "" ? t.seedKept : t.seedRandom}>
    ${(ids) => html`<div class="row seed">
      <input ...${ids} class="input num grow" inputmode="numeric" pattern="[0-9]*" placeholder=${t.seedPlaceholder} value=${form.seed}
        onInput=${(event) => { const seed = event.target.value.replace(/\D/g, "").slice(0, 20); fill({ seed, isSeedKept: seed !== "" }); }} />
      <${Button} icon="dice" label=${t.dice} onClick=${dice} />
      <${Button} icon=${form.isSeedKept ? "lock" : "unlock"} label=${t.lock} pressed=${form.isSeedKept}
        onClick=${() => fill(form.isSeedKept ? { isSeedKept: false, seed: "" } : { isSeedKept: true, seed: form.seed || String(studio.get().shown?.seed ?? "") || String(crypto.getRandomValues(new Uint32Array(1))[0]) })} />
    </div>`}<//>`;
}

function Input({ form, why, whyMask, card, errors }) {
  const file = useRef(null);
  const [isOver, setOver] = useState(false);
  const take = async (blob, name) => {
    try {
      await usePicture(blob, name);
    } catch (fault) {
      toastError(fault);
    }
  };
  const drop = async (event) => {
    event.preventDefault();
    setOver(false);
    if (why) return;
    const dropped = [...event.dataTransfer.files].find((one) => one.type.startsWith("image/"));
    const path = event.dataTransfer.getData("text/x-sdfleet-output");
    if (dropped) await take(dropped, dropped.name);
    else if (path) await take(await call(path, { as: "blob" }), t.fromGallery);
  };
  const { image, mask } = form;
  return html`<div class="field">
    <div class="field-head"><span class="label">${t.input}</span></div>
    ${!image ? html`<div class=${`drop ${isOver ? "over" : ""} ${why ? "off" : ""}`} onDragOver=${(event) => { event.preventDefault(); setOver(true); }}
        onDragLeave=${() => setOver(false)} onDrop=${drop}>
        <${Icon} name="image" /><span>${why || t.dropHere}</span>
        <${Button} class="small" disabled=${!!why} onClick=${() => file.current.click()}>${t.chooseFile}<//>
      </div>`
      : html`<div class="input-picture" onDragOver=${(event) => event.preventDefault()} onDrop=${drop}>
        <div class="thumb"><img src=${image.url} alt=${t.inputAlt(image.name)} />${mask && html`<img class="mask" src=${mask} alt="" />`}</div>
        <div class="stack tight grow">
          <p class="small"><span class="ellipsis">${image.name}</span> <span class="quiet-text num">${image.width} × ${image.height}</span></p>
          <div class="row">
            <${Button} class="small" icon="brush" disabled=${!!whyMask} pressed=${mask ? true : undefined} onClick=${() => studio.set({ dialog: { kind: "mask" } })}>${mask ? t.editMask : t.paintMask}<//>
            <${Button} class="small" icon="wand" label=${t.likeInput} onClick=${async () => { try { likeThis(await call("/api/metadata", { method: "POST", body: { image: image.url } })); } catch (fault) { toastError(fault); } }} />
            <${Button} class="small" icon="trash" label=${t.removeInput} onClick=${() => fill({ image: null, mask: null, strength: null, ratio: form.ratio === "image" ? "1:1" : form.ratio })} />
          </div>
          ${whyMask && html`<p class="told">${whyMask}</p>`}
        </div></div>
        <${Slider} label=${t.strength} name="strength" min=${0.05} max=${1} step=${0.05} value=${form.strength} fallback=${card?.strength ?? 0.75} error=${errors.strength} />`}
    <input ref=${file} type="file" accept="image/*" hidden
      onChange=${(event) => { const [chosen] = event.target.files; event.target.value = ""; if (chosen) take(chosen, chosen.name); }} />
    ${(errors.image || errors.mask) && html`<p class="told error">${errors.image || errors.mask}</p>`}
  </div>`;
}

/** A picture that is pasted or dropped anywhere on the page becomes the input; no file that is dropped replaces the page. */
function usePictures() {
  useEffect(() => {
    const take = (event, files, name) => {
      const file = [...(files ?? [])].find((one) => one.type.startsWith("image/"));
      if (!file || event.defaultPrevented) return;
      event.preventDefault();
      const card = cardOf(studio.get());
      if (card?.ignores.includes("image")) toast(t.ignored.image(card.title));
      else usePicture(file, name ?? file.name).catch(toastError);
    };
    const listened = {
      paste: (event) => take(event, event.clipboardData?.files, t.pasted),
      dragover: (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault(),
      drop: (event) => {
        take(event, event.dataTransfer?.files);
        if (event.dataTransfer?.files.length) event.preventDefault();
      },
    };
    for (const [name, listener] of Object.entries(listened)) addEventListener(name, listener);
    return () => { for (const [name, listener] of Object.entries(listened)) removeEventListener(name, listener); };
  }, []);
}
