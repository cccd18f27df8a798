// The generations of every layer, one at a time: by the slider, or played. `element` and `watch` are Gradio's.
const PAUSE = 500;

const show = (panel, g) => {
  const { frames, entropy } = JSON.parse(panel.dataset.curve);
  const last = frames.length - 1;
  panel.querySelector("input").value = g;
  panel.querySelector("output").textContent = `${g} of ${last}`;
  panel.querySelectorAll(".im-bars > div").forEach((bar, i) => {
    const percent = 100 * frames[g][i];
    bar.querySelector("i").style.width = `${percent.toFixed(1)}%`;
    bar.querySelector("b").textContent = `${percent.toFixed(0)} %`;
  });
  panel.querySelector(".im-entropy b").textContent = entropy[g].toFixed(2);
  const x = last ? (100 * g) / last : 0;
  for (const end of ["x1", "x2"]) panel.querySelector(".im-now").setAttribute(end, x);
};
const stop = (panel) => {
  clearInterval(panel.playing);
  panel.playing = null;
  panel.querySelector("button").textContent = "▶ Play";
};
const play = (panel) => {
  const last = Number(panel.querySelector("input").max);
  let g = Number(panel.querySelector("input").value);
  g = g >= last ? 0 : g;
  show(panel, g);
  panel.querySelector("button").textContent = "❚❚ Pause";
  panel.playing = setInterval(() => {
    if (!panel.isConnected || g >= last) return stop(panel);
    show(panel, (g += 1));
  }, PAUSE);
};

element.addEventListener("input", (event) => {
  const panel = event.target.closest(".im-generations");
  if (!panel) return;
  stop(panel);
  show(panel, Number(event.target.value));
});
element.addEventListener("click", (event) => {
  const panel = event.target.closest(".im-generations button")?.closest(".im-generations");
  if (panel) panel.playing ? stop(panel) : play(panel);
});
// The page keeps elements whose text stays: what a reader did to them before is undone.
watch("value", () => {
  element.querySelectorAll(".im-generations").forEach((panel) => {
    stop(panel);
    show(panel, Number(panel.querySelector("input").max));
  });
});
