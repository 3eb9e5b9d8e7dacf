// Lines over the last minutes, drawn by hand on a canvas: axes with units, gaps where nothing was known.

const SPAN = 120; // seconds
const FONT = "11px system-ui, sans-serif";

/** 1, 2 or 5 times a power of ten: the least that is not below `value`. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.9999);
}

export class Plot {
  #lines;
  #now = 0;

  /**
   * canvas; lines: [{ name, color }] with a colour's CSS variable; format: of a tick's value, with its unit;
   * least: the smallest top of the axis.
   */
  constructor(canvas, lines, format, least) {
    Object.assign(this, { canvas, format, least });
    this.#lines = lines.map((line) => ({ ...line, points: [] }));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** One value per line at `now` seconds; null where there is none. `label`: what the plot shows, in words. */
  add(now, values, label) {
    this.#now = now;
    values.forEach((value, at) => {
      const { points } = this.#lines[at];
      points.push([now, value]);
      while (points[0][0] < now - SPAN - 5) points.shift();
    });
    this.canvas.setAttribute("aria-label", label);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = devicePixelRatio;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const pen = this.canvas.getContext("2d");
    const style = getComputedStyle(this.canvas);
    const color = (name) => style.getPropertyValue(name);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = FONT;
    const known = this.#lines.flatMap(({ points }) => points.map(([, value]) => value ?? 0));
    const top = nice(Math.max(this.least, ...known));
    const ticks = [0, top / 2, top];
    const left = 6 + Math.max(...ticks.map((tick) => pen.measureText(this.format(tick)).width));
    const area = { left, right: width - 4, top: 18, bottom: height - 16 };
    const x = (at) => area.right - ((this.#now - at) / SPAN) * (area.right - area.left);
    const y = (value) => area.bottom - (value / top) * (area.bottom - area.top);
    this.#axes(pen, color, area, ticks, x, y);
    this.#legend(pen, color, area);
    pen.save();
    pen.beginPath();
    pen.rect(area.left, area.top - 2, area.right - area.left + 2, area.bottom - area.top + 4);
    pen.clip();
    for (const line of this.#lines) this.#line(pen, color(line.color), line.points, x, y);
    pen.restore();
  }

  #axes(pen, color, area, ticks, x, y) {
    pen.strokeStyle = color("--line");
    pen.fillStyle = color("--dim");
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of ticks) {
      const at = Math.round(y(tick)) + 0.5;
      pen.beginPath();
      pen.moveTo(area.left, at);
      pen.lineTo(area.right, at);
      pen.stroke();
      pen.fillText(this.format(tick), area.left - 5, at);
    }
    pen.textBaseline = "alphabetic";
    for (const [ago, align] of [[SPAN, "left"], [SPAN / 2, "center"], [0, "right"]]) {
      pen.textAlign = align;
      pen.fillText(ago ? `−${ago} s` : "now", x(this.#now - ago), area.bottom + 13);
    }
  }

  #legend(pen, color, area) {
    pen.textAlign = "left";
    let at = area.left;
    for (const { name, color: line } of this.#lines) {
      pen.fillStyle = color(line);
      pen.fillRect(at, 5, 10, 3);
      pen.fillStyle = color("--dim");
      pen.fillText(name, at + 14, 10);
      at += 28 + pen.measureText(name).width;
    }
  }

  #line(pen, color, points, x, y) {
    pen.strokeStyle = pen.fillStyle = color;
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    let before = null;
    pen.beginPath();
    points.forEach(([at, value], number) => {
      if (value === null) {
        before = null;
        return;
      }
      const joined = before !== null && at - before < 5; // the tab was hidden for longer
      if (joined) pen.lineTo(x(at), y(value));
      else pen.moveTo(x(at), y(value));
      const alone = !joined && (points[number + 1]?.[1] ?? null) === null;
      if (alone) pen.rect(x(at) - 0.5, y(value) - 0.5, 1, 1);
      before = at;
    });
    pen.stroke();
  }
}
