// Windows of the studio: models to download, two pictures side by side, a request as code. The brush has its own file.

import { call, lines } from "./api.js";
import { may, session } from "./app.js";
import { bytes, duration, text } from "./text.js";
import { Badge, Button, Dialog, Fault, Progress, copyText, html, toast, useEffect, useRef, useState, useStore } from "./ui.js";
import { fill, loadChoices, studio } from "./studio_state.js";
import { MaskDialog } from "./studio_mask.js";

const t = text.studio;
const close = () => studio.set({ dialog: null });

export function Dialogs({ dialog }) {
  if (dialog.kind === "mask") return html`<${MaskDialog} onClose=${close} />`;
  if (dialog.kind === "code") return html`<${Code} body=${dialog.body} />`;
  if (dialog.kind === "compare") return html`<${Compare} pair=${dialog.pair} />`;
  if (dialog.kind === "models") return html`<${Models} />`;
  return html`<${Pull} name=${dialog.name} key=${dialog.name} />`;
}

// ------------------------------------------------------------------------------------------------------------- models

function Models() {
  const { cards, absent } = useStore(studio);
  const row = (card, isHere) => html`<li key=${card.name} class="model-row"><div class="grow"><p><strong>${card.title}</strong> <code class="small">${card.name}</code></p>
      <div class="row"><${Badge} kind="accent">${card.family_title}<//><${Badge}>${card.width} × ${card.height}<//><${Badge}>${t.nSteps(card.steps)}<//>
        ${card.licence && html`<${Badge}>${card.licence}<//>`}${card.gated && html`<${Badge} kind="warn">${t.gated}<//>`}</div>
      ${card.ignores.length > 0 && html`<p class="hint">${t.ignoresAll(card.ignores)}</p>`}</div>
    ${isHere ? html`<${Button} onClick=${() => { fill({ model: card.name, steps: null, guidance: null, sampler: "" }); close(); }}>${t.use}<//>`
      : html`<${Button} kind="primary" icon="download" disabled=${!may("manage")} onClick=${() => studio.set({ dialog: { kind: "pull", name: card.name } })}>${t.get}<//>`}</li>`;
  return html`<${Dialog} title=${t.modelsTitle} onClose=${close}>
    <ul class="models">${cards.map((card) => row(card, true))}${absent.map((card) => row(card, false))}</ul>
    ${!may("manage") && html`<p class="hint">${t.mayNotPull}</p>`}<//>`;
}

/** The plan of a download, a yes, and how far it is. */
function Pull({ name }) {
  const [source, setSource] = useState("");
  const [asked, setAsked] = useState(null);
  const [fault, setFault] = useState(null);
  const [files, setFiles] = useState(null);
  const stop = useRef(null);
  const bodyOf = (more = {}) => ({ model: name, stream: true, ...(source ? { source } : {}), ...more });

  const run = async (more) => {
    stop.current?.abort();
    const mine = (stop.current = new AbortController());
    setFault(null);
    try {
      for await (const status of lines("/api/pull", { method: "POST", body: bodyOf(more), signal: mine.signal })) {
        if (status.file) setFiles((now) => ({ ...now, [status.file]: status }));
        else if (status.status === "success") return done();
      }
    } catch (error) {
      if (mine.signal.aborted) return undefined;
      if (error.status === 409 && error.body?.confirm) setAsked(error.body);
      else setFault(error);
      setFiles(null);
    }
    return undefined;
  };
  const done = async () => {
    await loadChoices();
    fill({ model: name, steps: null, guidance: null, sampler: "" });
    toast(t.pulled(name), { kind: "good" });
    close();
  };
  useEffect(() => {
    setAsked(null);
    run();
    return () => stop.current?.abort();
  }, [source]);

  const plan = asked?.plan;
  const total = plan ? plan.n_left_bytes : 0;
  const completed = files ? Object.values(files).reduce((sum, file) => sum + (file.completed ?? 0), 0) : 0;
  const isRunning = files !== null;
  return html`<${Dialog} title=${t.pullTitle(name)} onClose=${close} foot=${html`
      <${Button} onClick=${close}>${isRunning ? t.stopPull : text.cancel}<//>
      ${!isRunning && html`<${Button} kind="primary" icon="download" disabled=${!asked} onClick=${() => { setFiles({}); run({ confirm: asked.confirm }); }}>${plan ? t.pullYes(bytes(total)) : t.get}<//>`}`}>
    <div class="stack">
      ${fault && html`<${Fault} error=${fault}><${Button} class="small" onClick=${() => run()}>${t.tryAgain}<//><//>`}
      ${!asked && !fault && html`<p aria-busy="true">${t.pullAsking}</p>`}
      <label class="row"><span class="label">${t.pullFrom}</span><select class="select narrow" value=${source} disabled=${isRunning} onChange=${(event) => setSource(event.target.value)}>
        <option value="">${t.pullDefault}</option><option value="hf">Hugging Face</option><option value="modelscope">ModelScope</option></select></label>
      ${plan && html`<dl class="facts-list">${t.plan(plan, bytes, duration).map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl>
        ${plan.licence_url && html`<p class="small"><a href=${plan.licence_url} target="_blank" rel="noreferrer noopener">${t.readLicence}</a></p>`}`}
      ${isRunning && html`<div class="stack tight"><${Progress} share=${total ? Math.min(1, completed / total) : undefined} label=${t.pullProgress} />
        <p class="num small" role="status">${t.pullDone(bytes(completed), bytes(total))}</p></div>`}
    </div><//>`;
}

// ------------------------------------------------------------------------------------------------------------ compare

function Compare({ pair: [left, right] }) {
  const [share, setShare] = useState(50);
  const made = [useMade(left), useMade(right)];
  return html`<${Dialog} class="wide" title=${t.compareTitle} onClose=${close}>
    <div class="compare" style=${{ aspectRatio: `${left.width} / ${left.height}` }}>
      <img src=${left.url} alt=${t.compareLeft(left.prompt)} /><img src=${right.url} alt=${t.compareRight(right.prompt)} style=${{ clipPath: `inset(0 0 0 ${share}%)` }} />
      <div class="compare-line" style=${{ left: `${share}%` }}></div>
      <input type="range" min="0" max="100" step="0.5" value=${share} aria-label=${t.compareSlider} onInput=${(event) => setShare(Number(event.target.value))} />
    </div>
    <div class="compare-facts">${made.map((one, i) => html`<div key=${i}><p class="clamp"><b>${t.compareSides[i]}</b> ${one?.prompt ?? ""}</p><dl class="facts-list num">${one && t.facts(one, [left, right][i]).map(([name, value], at) => {
      const other = made[1 - i] ? t.facts(made[1 - i], [left, right][1 - i])[at]?.[1] : value;
      return html`<div key=${name} class=${other === value ? "" : "differs"}><dt>${name}</dt><dd>${value}</dd></div>`;
    })}</dl></div>`)}</div><//>`;
}

function useMade(output) {
  const [made, setMade] = useState(null);
  useEffect(() => { call(`/api/outputs/${output.id}/metadata`).then(setMade, () => {}); }, [output.id]);
  return made;
}

// --------------------------------------------------------------------------------------------------------------- code

const KINDS = ["curl", "Python", "JSON"];

function Code({ body }) {
  const [kind, setKind] = useState("curl");
  const needsKey = session.get().who?.needs_key ?? false;
  const shown = { ...body };
  // A picture is megabytes of base64: it is copied whole, and shown short.
  for (const name of ["image", "mask"]) if (shown[name]) shown[name] = `${shown[name].slice(0, 40)}…`;
  return html`<${Dialog} title=${t.codeTitle} onClose=${close} foot=${html`<${Button} kind="primary" icon="copy" onClick=${() => copyText(codeOf(kind, body, needsKey), t.codeCopied(kind))}>${text.copy}<//>`}>
    <div class="row" role="group" aria-label=${t.codeKind}>${KINDS.map((name) => html`<${Button} key=${name} class="small" pressed=${kind === name} onClick=${() => setKind(name)}>${name}<//>`)}</div>
    <pre class="code" tabindex="0" aria-label=${t.codeTitle}>${codeOf(kind, shown, needsKey)}</pre>
    ${body.image && html`<p class="hint">${t.codeShortened}</p>`}${needsKey && kind !== "JSON" && html`<p class="hint">${t.codeKey}</p>`}<//>`;
}

function codeOf(kind, body, needsKey) {
  const url = `${location.origin}/api/${body.image ? "img2img" : "txt2img"}`;
  const json = JSON.stringify(body, null, 2);
  if (kind === "JSON") return json;
  if (kind === "curl") {
    const key = needsKey ? ' \\\n  -H "Authorization: Bearer $SD_API_KEY"' : "";
    return `curl ${url} -o picture.png \\\n  -H "Accept: image/png" -H "Content-Type: application/json"${key} \\\n  -d @- <<'JSON'\n${json}\nJSON`;
  }
  const key = needsKey ? '\n        "Authorization": "Bearer " + os.environ["SD_API_KEY"],' : "";
  return `import json${needsKey ? ", os" : ""}, urllib.request

asked = json.loads(r"""
${json.replaceAll('"""', '\\u0022\\u0022\\u0022')}
""")
request = urllib.request.Request(
    "${url}",
    data=json.dumps(asked).encode(),
    headers={
        "Accept": "image/png",
        "Content-Type": "application/json",${key}
    },
)
with urllib.request.urlopen(request) as answer, open("picture.png", "wb") as file:
    file.write(answer.read())`;
}
