// A pad to draw on, white on black; `element`, `props` and `trigger` are Gradio's. Arrow keys move, the space bar draws.
const canvas = element.querySelector("canvas");
const pen = canvas.getContext("2d");
const width = Number(canvas.dataset.width);
const at = { x: canvas.width / 2, y: canvas.height / 2 };
let down = false;

const clear = () => {
  pen.fillStyle = "black";
  pen.fillRect(0, 0, canvas.width, canvas.height);
};
const line = (x, y) => {
  pen.strokeStyle = "white";
  pen.lineWidth = width;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(at.x, at.y);
  pen.lineTo(x + 0.01, y);
  pen.stroke();
};
const move = (x, y) => {
  at.x = Math.min(canvas.width, Math.max(0, x));
  at.y = Math.min(canvas.height, Math.max(0, y));
};
const tell = () => {
  props.value = canvas.toDataURL("image/png");
  trigger("change");
};
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
};

canvas.addEventListener("pointerdown", (event) => {
  down = true;
  canvas.setPointerCapture(event.pointerId);
  move(...place(event));
  line(at.x, at.y);
});
canvas.addEventListener("pointermove", (event) => {
  if (!down) return;
  const [x, y] = place(event);
  line(x, y);
  move(x, y);
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => {
    if (down) tell();
    down = false;
  });

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const cursor = element.querySelector(".im-cursor");
let pressed = false;
const show = () => {
  cursor.style.left = `${(100 * at.x) / canvas.width}%`;
  cursor.style.top = `${(100 * at.y) / canvas.height}%`;
};
canvas.addEventListener("keydown", (event) => {
  const step = STEPS[event.key];
  if (!step && event.key !== " ") return;
  event.preventDefault();
  if (event.key === " ") pressed = true;
  const [x, y] = step ? [at.x + 8 * step[0], at.y + 8 * step[1]] : [at.x, at.y];
  if (pressed) line(x, y);
  move(x, y);
  show();
});
const lifted = (event) => {
  if (pressed && (event.type === "blur" || event.key === " ")) {
    pressed = false;
    tell();
  }
};
canvas.addEventListener("keyup", lifted);
canvas.addEventListener("blur", lifted);
element.querySelector("button").addEventListener("click", () => {
  clear();
  props.value = "";
  trigger("change");
});
clear();
show();
