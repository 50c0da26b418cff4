"use strict";
// Reads the rounded attributes (the layout of zoo/neural3d/packed.py) and draws them by the definition of
// zoo/shared/ops/rasterize_reference.py: sorted by depth, cut where they add less than 1/255.

// Whole numbers, column by column: byte planes, signs folded in, positions as differences.
function decode(meta, bytes) {
  const n = meta.count, found = {};
  let at = 0;
  for (const { name, width, depth, differences } of meta.streams) {
    const values = new Float64Array(n * width);
    for (let plane = 0, unit = 1; plane < depth; plane++, unit *= 256)
      for (let column = 0; column < width; column++)
        for (let row = 0; row < n; row++) values[row * width + column] += bytes[at++] * unit;
    for (let i = 0; i < values.length; i++)
      values[i] = values[i] % 2 ? -(values[i] + 1) / 2 : values[i] / 2;
    if (differences) for (let i = width; i < values.length; i++) values[i] += values[i - width];
    found[name] = values;
  }
  if (at !== bytes.length) throw new Error(`${bytes.length} bytes, expected ${at}`);
  return found;
}

// Sixteen floats a Gaussian: mean and opacity, the six numbers of its covariance, its colour.
function gaussians(meta, found) {
  const n = meta.count, step = meta.steps, out = new Float32Array(16 * n);
  for (let i = 0; i < n; i++) {
    const at = 16 * i;
    for (let k = 0; k < 3; k++) out[at + k] = found.position[3 * i + k] * step.position + meta.origin[k];
    out[at + 3] = found.opacity[i] * step.opacity;
    const [x, y, z] = [0, 1, 2].map(k => found.rotation[3 * i + k] * step.rotation);
    const first = Math.sqrt(Math.max(1e-6, 1 - x * x - y * y - z * z));
    const length = Math.hypot(first, x, y, z);
    const [qw, qx, qy, qz] = [first / length, x / length, y / length, z / length];
    const turn = [
      1 - 2 * (qy * qy + qz * qz), 2 * (qx * qy - qw * qz), 2 * (qx * qz + qw * qy),
      2 * (qx * qy + qw * qz), 1 - 2 * (qx * qx + qz * qz), 2 * (qy * qz - qw * qx),
      2 * (qx * qz - qw * qy), 2 * (qy * qz + qw * qx), 1 - 2 * (qx * qx + qy * qy)];
    const size = [0, 1, 2].map(k => Math.exp(2 * found.scale[3 * i + k] * step.scale));
    let place = at + 4;
    for (let row = 0; row < 3; row++)
      for (let column = row; column < 3; column++, place++)
        for (let k = 0; k < 3; k++) out[place] += turn[3 * row + k] * size[k] * turn[3 * column + k];
    const luma = found.colour[3 * i] * step.colour;
    const orange = found.colour[3 * i + 1] * step.colour * 2, green = found.colour[3 * i + 2] * step.colour * 2;
    out[at + 10] = luma + orange - green;
    out[at + 11] = luma + green;
    out[at + 12] = luma - orange - green;
  }
  return out;
}

// Rows of the matrix world -> camera (x right, y down, z ahead) and where the camera stands.
function orbit(view) {
  const axis = view.up.findIndex(value => value !== 0), sign = view.up[axis];
  const around = [0, 0, 0], flat = Math.cos(view.elevation);
  around[(axis + 1) % 3] = Math.cos(view.azimuth) * flat;
  around[(axis + 2) % 3] = Math.sin(view.azimuth) * flat;
  around[axis] = sign * Math.sin(view.elevation);
  const ahead = around.map(value => -value), eye = around.map((value, k) => view.target[k] + view.distance * value);
  const cross = (a, b) => [0, 1, 2].map(k => a[(k + 1) % 3] * b[(k + 2) % 3] - a[(k + 2) % 3] * b[(k + 1) % 3]);
  const across = cross(ahead, view.up), length = Math.hypot(...across), right = across.map(value => value / length);
  return { right, down: cross(ahead, right), ahead, eye };
}

// Indices from far to near of the Gaussians in front of the camera: two passes over the bits of the depth.
function sorted(floats, n, camera, room) {
  const { keys, one, other } = room, bits = new Uint32Array(keys.buffer), [a, b, c] = camera.ahead;
  const shift = a * camera.eye[0] + b * camera.eye[1] + c * camera.eye[2];
  const low = new Uint32Array(65537), high = new Uint32Array(65537);
  let seen = 0;
  for (let i = 0; i < n; i++) {
    const depth = a * floats[16 * i] + b * floats[16 * i + 1] + c * floats[16 * i + 2] - shift;
    if (!(depth > 0.01)) continue;
    keys[i] = depth;
    other[seen++] = i;
    low[(bits[i] & 65535) + 1]++;
    high[(bits[i] >>> 16) + 1]++;
  }
  for (let i = 0; i < 65536; i++) { low[i + 1] += low[i]; high[i + 1] += high[i]; }
  for (let i = 0; i < seen; i++) one[low[bits[other[i]] & 65535]++] = other[i];
  for (let i = 0; i < seen; i++) other[seen - 1 - high[bits[one[i]] >>> 16]++] = one[i];
  return seen;
}

const VERTEX = `#version 300 es
precision highp float; precision highp int; precision highp sampler2D; precision highp isampler2D;
layout(location = 0) in vec2 corner;
layout(location = 1) in uint row;
uniform sampler2D scene; uniform isampler2D waves;
uniform mat3 turn; uniform vec3 eye; uniform vec2 size; uniform float focal, step_, antialiased; uniform int bases;
out vec2 place; out vec4 tone; out float reach;
vec4 texel(int index) { int w = textureSize(scene, 0).x; return texelFetch(scene, ivec2(index % w, index / w), 0); }
vec3 wave(int index) { int w = textureSize(waves, 0).x; return step_ * vec3(texelFetch(waves, ivec2(index % w, index / w), 0).rgb); }
vec3 harmonics(int at, vec3 d) {
  float x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  vec3 sum = 0.48860251190292 * (-y * wave(at) + z * wave(at + 1) - x * wave(at + 2));
  if (bases > 4) sum += 1.092548430592079 * (x * y * wave(at + 3) - y * z * wave(at + 4) - x * z * wave(at + 6))
    + (0.9461746957575601 * zz - 0.3153915652525201) * wave(at + 5) + 0.5462742152960395 * (xx - yy) * wave(at + 7);
  if (bases > 9) sum += 0.5900435899266435 * (-y * (3. * xx - yy) * wave(at + 8) - x * (xx - 3. * yy) * wave(at + 14))
    + 1.445305721320277 * z * (2. * x * y * wave(at + 9) + (xx - yy) * wave(at + 13))
    + (0.4570457994644658 - 2.285228997322329 * zz) * (y * wave(at + 10) + x * wave(at + 12))
    + z * (1.865881662950577 * zz - 1.119528997770346) * wave(at + 11);
  return sum;
}
void main() {
  int at = 4 * int(row);
  vec4 first = texel(at), second = texel(at + 1), third = texel(at + 2);
  vec3 seen = turn * (first.xyz - eye);
  mat3 sigma = mat3(second.x, second.y, second.z, second.y, second.w, third.x, second.z, third.x, third.y);
  vec2 slope = clamp(seen.xy / seen.z, -0.65 * size / focal, 0.65 * size / focal);
  vec3 across = focal / seen.z * (transpose(turn) * vec3(1., 0., -slope.x));
  vec3 down = focal / seen.z * (transpose(turn) * vec3(0., 1., -slope.y));
  float a = dot(across, sigma * across), b = dot(across, sigma * down), c = dot(down, sigma * down);
  float bare = a * c - b * b;
  a += 0.3; c += 0.3;
  float opacity = first.w * mix(1., sqrt(max(bare, 0.) / (a * c - b * b)), antialiased);
  float middle = 0.5 * (a + c), half_ = sqrt(max(0.25 * (a - c) * (a - c) + b * b, 0.));
  vec2 axis = abs(b) > 1e-9 ? normalize(vec2(b, middle + half_ - a)) : (a >= c ? vec2(1., 0.) : vec2(0., 1.));
  float wide = sqrt(middle + half_), narrow = sqrt(max(middle - half_, 1e-9));
  reach = 2. * log(255. * opacity);
  gl_Position = vec4(2., 2., 2., 1.);
  place = corner; tone = vec4(0.);
  if (!(reach > 0.)) return;
  vec2 pixel = focal * seen.xy / seen.z + 0.5 * size
    + sqrt(reach) * (corner.x * wide * axis + corner.y * narrow * vec2(-axis.y, axis.x));
  gl_Position = vec4(2. * pixel.x / size.x - 1., 1. - 2. * pixel.y / size.y, 0., 1.);
  vec3 colour = vec3(third.z, third.w, texel(at + 3).x);
  if (bases > 1) colour += harmonics((bases - 1) * int(row), normalize(first.xyz - eye));
  tone = vec4(max(colour, 0.), opacity);
}`;
const FRAGMENT = `#version 300 es
precision highp float;
in vec2 place; in vec4 tone; in float reach; out vec4 light;
void main() {
  float alpha = min(0.999, tone.a * exp(-0.5 * reach * dot(place, place)));
  if (alpha < 1. / 255.) discard;
  light = vec4(tone.rgb * alpha, alpha);
}`;
const COVER = `#version 300 es
layout(location = 0) in vec2 corner;
void main() { gl_Position = vec4(corner, 0., 1.); }`;
const OVER = `#version 300 es
precision highp float;
uniform sampler2D layer; uniform vec3 ground; out vec4 light;
void main() { vec4 seen = texelFetch(layer, ivec2(gl_FragCoord.xy), 0); light = vec4(seen.rgb + (1. - seen.a) * ground, 1.); }`;

function program(gl, vertex, fragment) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
  return { made, at: name => gl.getUniformLocation(made, name) };
}

function texture(gl, unit, texels, make) {
  const width = Math.min(4096, gl.getParameter(gl.MAX_TEXTURE_SIZE)), height = Math.max(1, Math.ceil(texels / width));
  if (height > gl.getParameter(gl.MAX_TEXTURE_SIZE)) throw new Error("more Gaussians than this graphics driver holds");
  gl.activeTexture(gl.TEXTURE0 + unit);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  for (const which of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, which, gl.NEAREST);
  make(width, height);
}

// A function that draws a view of the Gaussians into the canvas.
function painter(canvas, meta, floats, waves) {
  const gl = canvas.getContext("webgl2", { antialias: false, alpha: false });
  if (!gl) throw new Error("this browser has no WebGL 2");
  const layered = gl.getExtension("EXT_color_buffer_float") || gl.getExtension("EXT_color_buffer_half_float");
  const splat = program(gl, VERTEX, FRAGMENT), over = program(gl, COVER, OVER), n = meta.count;
  gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  texture(gl, 0, 4 * n, (width, height) => {
    const padded = new Float32Array(4 * width * height);
    padded.set(floats);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, width, height, 0, gl.RGBA, gl.FLOAT, padded);
  });
  texture(gl, 1, (meta.bases - 1) * n, (width, height) => {
    const padded = new Int16Array(3 * width * height);
    padded.set(waves);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB16I, width, height, 0, gl.RGB_INTEGER, gl.SHORT, padded);
  });
  texture(gl, 2, 1, () => {});
  const layer = gl.getParameter(gl.TEXTURE_BINDING_2D), frame = gl.createFramebuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
  gl.enableVertexAttribArray(0);
  gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, 4 * n, gl.DYNAMIC_DRAW);
  gl.vertexAttribIPointer(1, 1, gl.UNSIGNED_INT, 0, 0);
  gl.vertexAttribDivisor(1, 1);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  const room = { keys: new Float32Array(n), one: new Uint32Array(n), other: new Uint32Array(n) };
  let size = "";
  return function paint(view, ground) {
    const { width, height } = canvas, camera = orbit(view);
    if (size !== `${width} ${height}`) {
      size = `${width} ${height}`;
      gl.activeTexture(gl.TEXTURE2);
      if (layered) gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA16F, width, height, 0, gl.RGBA, gl.HALF_FLOAT, null);
      else gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, width, height, 0, gl.RGBA, gl.UNSIGNED_BYTE, null);
      gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
      gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, layer, 0);
    }
    const seen = sorted(floats, n, camera, room);
    gl.bufferSubData(gl.ARRAY_BUFFER, 0, room.other.subarray(0, seen));
    gl.viewport(0, 0, width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(splat.made);
    gl.enable(gl.BLEND);
    gl.enableVertexAttribArray(1);
    const rows = [camera.right, camera.down, camera.ahead];
    gl.uniformMatrix3fv(splat.at("turn"), false, [0, 1, 2].flatMap(k => rows.map(row => row[k])));
    gl.uniform3fv(splat.at("eye"), camera.eye);
    gl.uniform2f(splat.at("size"), width, height);
    gl.uniform1f(splat.at("focal"), Math.min(width, height) / 2 / Math.tan(meta.field_of_view / 2));
    gl.uniform1f(splat.at("step_"), meta.steps.harmonics);
    gl.uniform1f(splat.at("antialiased"), meta.antialiased ? 1 : 0);
    gl.uniform1i(splat.at("bases"), meta.bases);
    gl.uniform1i(splat.at("scene"), 0);
    gl.uniform1i(splat.at("waves"), 1);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, seen);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.disable(gl.BLEND);
    gl.disableVertexAttribArray(1);
    gl.useProgram(over.made);
    gl.uniform1i(over.at("layer"), 2);
    gl.uniform3fv(over.at("ground"), ground);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  };
}

async function start() {
  const element = id => document.getElementById(id), canvas = document.querySelector("canvas");
  const meta = JSON.parse(element("meta").textContent);
  const text = atob(element("data").textContent.trim()), packed = Uint8Array.from(text, c => c.charCodeAt(0));
  const inflated = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const found = decode(meta, new Uint8Array(await new Response(inflated).arrayBuffer()));
  const paint = painter(canvas, meta, gaussians(meta, found), found.harmonics);
  const ups = [[0, -1, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1], [1, 0, 0], [-1, 0, 0]];
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (name, otherwise) => Number.isFinite(parseFloat(asked.get(name))) ? parseFloat(asked.get(name)) : otherwise;
  const grounds = [meta.background, [0.07, 0.07, 0.08], [0.96, 0.96, 0.95]];
  let view, up = Math.max(0, ups.findIndex(one => one.join() === meta.up.join())), ground = 0, due = false, turning = false, last = 0;
  document.body.classList.toggle("bare", asked.has("bare"));
  const reset = () => {
    view = { target: [...meta.centre], distance: number("distance", meta.distance), azimuth: number("azimuth", 0),
      elevation: number("elevation", 0.35), up: ups[up] };
    redraw();
  };
  const draw = now => {
    due = false;
    const dense = Math.min(2, window.devicePixelRatio || 1);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * dense));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * dense));
    if (turning) { view.azimuth += Math.min(0.1, (now - last) / 4000); redraw(); }
    last = now;
    paint(view, grounds[ground]);
  };
  const redraw = () => { if (!due) { due = true; requestAnimationFrame(draw); } };
  const turn = (x, y) => {
    view.azimuth += x;
    view.elevation = Math.max(-1.5, Math.min(1.5, view.elevation + y));
    redraw();
  };
  const near = factor => { view.distance *= Math.max(0.2, Math.min(5, factor)); redraw(); };
  const move = (x, y) => {
    const { right, down } = orbit(view), scale = view.distance / Math.min(canvas.clientWidth, canvas.clientHeight);
    view.target = view.target.map((value, k) => value - scale * (x * right[k] + y * down[k]));
    redraw();
  };
  const fingers = new Map();
  canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); fingers.set(event.pointerId, event); });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, event => fingers.delete(event.pointerId));
  canvas.addEventListener("pointermove", event => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const x = event.clientX - before.clientX, y = event.clientY - before.clientY;
    if (fingers.size > 1) {
      const [fixed] = [...fingers.values()].filter(one => one.pointerId !== event.pointerId);
      const apart = one => Math.hypot(one.clientX - fixed.clientX, one.clientY - fixed.clientY);
      near(apart(before) / Math.max(1, apart(event)));
      move(x / 2, y / 2);
    } else if (event.shiftKey || event.buttons & 2) move(x, y);
    else turn(view.up[0] + view.up[1] + view.up[2] > 0 ? -x * 0.008 : x * 0.008, y * 0.008);
    fingers.set(event.pointerId, event);
  });
  canvas.addEventListener("contextmenu", event => event.preventDefault());
  canvas.addEventListener("wheel", event => { event.preventDefault(); near(Math.exp(event.deltaY * 0.001)); }, { passive: false });
  canvas.addEventListener("keydown", event => {
    const keys = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
    if (keys[event.key]) turn(...keys[event.key]);
    else if (event.key === "+" || event.key === "=") near(0.9);
    else if (event.key === "-") near(1.1);
    else return;
    event.preventDefault();
  });
  element("turn").addEventListener("click", event => {
    turning = !turning;
    event.target.setAttribute("aria-pressed", turning);
    redraw();
  });
  element("up").addEventListener("click", () => { up = (up + 1) % ups.length; view.up = ups[up]; redraw(); });
  element("ground").addEventListener("click", () => { ground = (ground + 1) % grounds.length; redraw(); });
  element("reset").addEventListener("click", reset);
  addEventListener("resize", redraw);
  element("problem").hidden = true;
  reset();
}

if (typeof document !== "undefined")
  start().catch(error => {
    document.getElementById("problem").textContent = `The scene cannot be shown: ${error.message}`;
    document.getElementById("problem").hidden = false;
  });
