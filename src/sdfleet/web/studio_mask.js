// The brush: what is painted is drawn anew, the rest of the picture is kept.

import { text } from "./text.js";
import { Button, Dialog, html, useEffect, useRef, useState } from "./ui.js";
import { fill, studio } from "./studio_state.js";

const t = text.studio;
const PAINT = "rgb(45 212 191)";
const MAX_UNDO = 30;

export function MaskDialog({ onClose }) {
  const { image, mask } = studio.get().form;
  const canvas = useRef(null);
  const [size, setSize] = useState(Math.max(8, Math.round(Math.min(image.width, image.height) / 6)));
  const [isErasing, setErasing] = useState(false);
  const strokes = useRef([]);
  const base = useRef(null);
  const cursor = useRef({ x: image.width / 2, y: image.height / 2 });
  const [nStrokes, setNStrokes] = useState(0);
  const [isDirty, setDirty] = useState(Boolean(mask));

  const redraw = () => {
    const context = canvas.current.getContext("2d");
    context.clearRect(0, 0, image.width, image.height);
    if (base.current) context.drawImage(base.current, 0, 0);
    for (const stroke of strokes.current) draw(context, stroke, image);
    setNStrokes(strokes.current.length);
  };
  useEffect(() => {
    if (!mask) return redraw();
    // The mask is white on black; the canvas holds paint on nothing.
    const before = new Image();
    before.onload = () => { base.current = asPaint(before, image); redraw(); };
    before.src = mask;
    return undefined;
  }, []);

  const place = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * image.width, ((event.clientY - box.top) / box.height) * image.height];
  };
  const begin = (event) => {
    if (event.button > 0) return;
    event.preventDefault();
    canvas.current.setPointerCapture(event.pointerId);
    strokes.current = [...strokes.current.slice(-200), { size, isErasing: isErasing || event.buttons === 32, points: [place(event)] }];
    setDirty(true);
    redraw();
  };
  const go = (event) => {
    if (!canvas.current.hasPointerCapture(event.pointerId)) return;
    const stroke = strokes.current.at(-1);
    for (const one of event.getCoalescedEvents?.() ?? [event]) stroke.points.push(place(one));
    draw(canvas.current.getContext("2d"), { ...stroke, points: stroke.points.slice(-8) }, image);
  };
  const keys = (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const at = cursor.current;
    if (by) {
      const far = event.shiftKey ? size / 8 : size / 2;
      at.x = Math.min(image.width, Math.max(0, at.x + by[0] * far));
      at.y = Math.min(image.height, Math.max(0, at.y + by[1] * far));
    } else if (event.key !== " ") return;
    event.preventDefault();
    // Space puts the brush down; with it held, the arrows paint.
    if (event.key === " ") strokes.current = [...strokes.current, { size, isErasing, points: [[at.x, at.y]] }];
    setDirty(true);
    redraw();
    mark(canvas.current.getContext("2d"), at, size);
  };
  const act = (next) => () => { strokes.current = next(strokes.current).slice(-MAX_UNDO * 10); redraw(); };
  const clear = () => { base.current = null; strokes.current = []; setDirty(false); redraw(); };
  const invert = () => {
    redraw();
    const whole = blank(image);
    const context = whole.getContext("2d");
    context.fillStyle = PAINT;
    context.fillRect(0, 0, image.width, image.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(canvas.current, 0, 0);
    base.current = whole;
    strokes.current = [];
    setDirty(true);
    redraw();
  };
  const keep = () => {
    redraw();
    fill({ mask: isDirty ? asMask(canvas.current, image) : null });
    onClose();
  };

  return html`<${Dialog} class="wide" title=${t.maskTitle} onClose=${onClose} foot=${html`<p class="hint grow">${t.maskHint}</p>
      <${Button} onClick=${onClose}>${text.cancel}<//><${Button} kind="primary" onClick=${keep}>${t.maskKeep}<//>`}>
    <div class="row mask-tools">
      <${Button} icon="brush" pressed=${!isErasing} onClick=${() => setErasing(false)}>${t.brush}<//>
      <${Button} pressed=${isErasing} onClick=${() => setErasing(true)}>${t.eraser}<//>
      <label class="row grow"><span class="label">${t.brushSize}</span><input type="range" min="2" max=${Math.round(Math.max(image.width, image.height) / 2)} value=${size} onInput=${(event) => setSize(Number(event.target.value))} /></label>
      <${Button} disabled=${nStrokes === 0} onClick=${act((all) => all.slice(0, -1))}>${t.undo}<//>
      <${Button} onClick=${invert}>${t.invert}<//><${Button} onClick=${clear}>${t.clear}<//>
    </div>
    <div class="mask-board" style=${{ aspectRatio: `${image.width} / ${image.height}` }}>
      <img src=${image.url} alt=${t.inputAlt(image.name)} />
      <canvas ref=${canvas} width=${image.width} height=${image.height} tabindex="0" role="application" aria-label=${t.maskCanvas}
        onPointerDown=${begin} onPointerMove=${go} onPointerUp=${() => redraw()} onKeyDown=${keys}></canvas>
    </div><//>`;
}

function blank({ width, height }) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return canvas;
}

function draw(context, { size, isErasing, points }) {
  context.save();
  context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = PAINT;
  context.lineWidth = size;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  const [[x, y], ...rest] = points;
  context.moveTo(x, y);
  // A press without a move is a dot; a line of no length would be nothing.
  if (!rest.length) context.lineTo(x + 0.01, y);
  for (const [toX, toY] of rest) context.lineTo(toX, toY);
  context.stroke();
  context.restore();
}

function mark(context, { x, y }, size) {
  context.save();
  context.strokeStyle = "white";
  context.lineWidth = Math.max(1, size / 24);
  context.setLineDash([4, 4]);
  context.beginPath();
  context.arc(x, y, size / 2, 0, 7);
  context.stroke();
  context.restore();
}

/** White where there is paint, black elsewhere. */
function asMask(painted, image) {
  const canvas = blank(image);
  const context = canvas.getContext("2d");
  context.drawImage(painted, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "white";
  context.fillRect(0, 0, image.width, image.height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "black";
  context.fillRect(0, 0, image.width, image.height);
  return canvas.toDataURL("image/png");
}

function asPaint(mask, image) {
  const canvas = blank(image);
  const context = canvas.getContext("2d");
  context.drawImage(mask, 0, 0, image.width, image.height);
  const pixels = context.getImageData(0, 0, image.width, image.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const shade = pixels.data[i];
    pixels.data.set([45, 212, 191, shade], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}
