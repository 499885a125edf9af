"use strict";
const NONE = -128;
const BEND = 0.75; // weak similarities are to be seen beside a diagonal of ones
const LABELLED = 40;

function unpacked(text) {
  return Int8Array.from(atob(text), (sign) => sign.charCodeAt(0));
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const parsed = (name) => {
    const text = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((place) => parseInt(text.slice(place, place + 2), 16));
  };
  const [neg, zero, pos, none] = ["--neg", "--zero", "--pos", "--none"].map(parsed);
  return (hundredths) => {
    if (hundredths === NONE) return none;
    const value = hundredths / 100, end = value < 0 ? neg : pos;
    const share = Math.abs(value) ** BEND;
    return zero.map((from, place) => Math.round(from + share * (end[place] - from)));
  };
}

// Draws the maps of `found` on the page's canvases and answers pointer and arrow keys; gives back
// what draws them anew, in the colours that hold now. `element` makes one of the page's elements.
function similarityMap(found, element) {
  const count = found.names.length;
  const readout = document.getElementById("pair");
  const values = {delta: unpacked(found.delta), outputs: unpacked(found.outputs)};
  const views = [...document.querySelectorAll("canvas.map")].map((canvas) =>
    ({canvas, values: values[canvas.dataset.of]}));
  const selected = {row: -1, column: -1};

  function paint(view, colour) {
    const image = new ImageData(count, count);
    for (let i = 0; i < count * count; i += 1) {
      const [red, green, blue] = colour(view.values[i]);
      image.data.set([red, green, blue, 255], 4 * i);
    }
    view.picture = element("canvas", {width: count, height: count});
    view.picture.getContext("2d").putImageData(image, 0, 0);
  }

  function draw(view) {
    const {canvas} = view, dots = window.devicePixelRatio || 1;
    const style = getComputedStyle(document.body);
    const ink = style.getPropertyValue("--ink"), soft = style.getPropertyValue("--soft");
    const paper = style.getPropertyValue("--paper");
    const room = canvas.parentElement.clientWidth;
    const context = canvas.getContext("2d");
    const font = `${11 * dots}px ui-monospace, Menlo, Consolas, "Liberation Mono", monospace`;
    let margin = 0;
    if (count <= LABELLED) {
      context.font = font;
      const longest = Math.max(...found.names.map((name) => context.measureText(name).width));
      margin = Math.min(longest + 8 * dots, 0.4 * room * dots);
    }
    const most = Math.min(room, 560 + margin / dots) * dots - margin;
    const cell = Math.max(1, Math.floor(Math.min(most / count, 26 * dots)));
    const side = cell * count;
    canvas.width = Math.ceil(margin) + side;
    canvas.height = side;
    canvas.style.width = `${canvas.width / dots}px`;
    canvas.style.height = `${canvas.height / dots}px`;
    view.left = Math.ceil(margin) / dots;
    view.cell = cell / dots;
    context.imageSmoothingEnabled = false;
    context.translate(Math.ceil(margin), 0);
    context.drawImage(view.picture, 0, 0, side, side);
    if (margin && cell >= 9 * dots) {
      context.font = font;
      context.fillStyle = soft;
      context.textAlign = "right";
      context.textBaseline = "middle";
      found.names.forEach((name, row) => {
        let shown = name;
        while (shown.length > 4 && context.measureText(shown).width > margin - 8 * dots) {
          shown = `${shown.slice(0, -2)}…`;
        }
        context.fillText(shown, -6 * dots, (row + 0.5) * cell);
      });
    }
    for (let first = 0; first < count;) {
      let last = first;
      while (last < count && found.groups[last] === found.groups[first]) last += 1;
      if (last - first > 1) {
        for (const [colour, width] of [[paper, 3], [ink, 1]]) {
          context.strokeStyle = colour;
          context.lineWidth = width * Math.round(dots);
          context.strokeRect(first * cell, first * cell, (last - first) * cell, (last - first) * cell);
        }
      }
      first = last;
    }
    if (selected.row >= 0) {
      context.fillStyle = ink;
      context.globalAlpha = 0.25;
      context.fillRect(0, selected.row * cell, side, cell);
      context.fillRect(selected.column * cell, 0, cell, side);
      context.globalAlpha = 1;
    }
  }

  const cosine = (view, place) => view.values[place] === NONE ? "not comparable" : (view.values[place] / 100).toFixed(2);
  function select(row, column) {
    if (row === selected.row && column === selected.column) return;
    Object.assign(selected, {row, column});
    views.forEach(draw);
    if (row < 0) return;
    const place = row * count + column;
    const [delta, outputs] = views.map((view) => cosine(view, place));
    const shared = row !== column && found.groups[row] === found.groups[column] ? ", served by the same adapter" : "";
    readout.replaceChildren(element("code", {textContent: found.names[row]}), " and ",
      element("code", {textContent: found.names[column]}), `: ΔW ${delta}, outputs ${outputs}${shared}`);
  }

  for (const view of views) {
    view.canvas.addEventListener("mousemove", (event) => {
      const column = Math.floor((event.offsetX - view.left) / view.cell);
      const row = Math.floor(event.offsetY / view.cell);
      if (row >= 0 && row < count && column >= 0 && column < count) select(row, column);
    });
    view.canvas.addEventListener("keydown", (event) => {
      const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!step) return;
      event.preventDefault();
      const inside = (place) => Math.min(Math.max(place, 0), count - 1);
      select(inside(selected.row + step[0]), inside(selected.column + step[1]));
    });
  }
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => views.forEach(draw));
  });
  return () => {
    const colour = colours();
    for (const view of views) { paint(view, colour); draw(view); }
    const scale = document.getElementById("scale"), context = scale.getContext("2d");
    for (let x = 0; x <= 200; x += 1) {
      context.fillStyle = `rgb(${colour(x - 100).join(" ")})`;
      context.fillRect(x, 0, 1, scale.height);
    }
  };
}
