// The server's endpoints.

import { json, request } from "./request.js";

export { ApiError, Offline, retryAfter, takeToken, useToken } from "./request.js";

/** A raw plane; null for 204. */
async function plane(path, length, method = "GET", options = {}) {
  const response = await request(method, path, options);
  if (response.status === 204) return null;
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (bytes.length !== length) throw new Error(`${path}: expected ${length} bytes, got ${bytes.length}`);
  return bytes;
}

/** gzip(uint32 n | n bytes of JSON | planes), `planes` by name. */
async function envelope(fields, planes) {
  const head = new TextEncoder().encode(JSON.stringify({ ...fields, planes: Object.keys(planes) }));
  const size = new DataView(new ArrayBuffer(4));
  size.setUint32(0, head.length, true);
  const stream = new Blob([size, head, ...Object.values(planes)]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const packed = { "Content-Type": "application/octet-stream", "Content-Encoding": "gzip" };

async function sendPacked(path, fields, planes, headers = {}) {
  return json("PUT", path, { body: await envelope(fields, planes), headers: { ...packed, ...headers } });
}

export async function sha256(bytes) {
  if (!crypto.subtle) return null; // plain http on another host
  const digest = await crypto.subtle.digest("SHA-256", bytes);
  return Array.from(new Uint8Array(digest), (value) => value.toString(16).padStart(2, "0")).join("");
}

export const me = () => json("GET", "/api/me");
export const guidelines = () => json("GET", "/api/guidelines");
export const next = () => json("POST", "/api/next", { json: {} });
/** The picture as {bitmap, stamp}; the stamp tells it from every other. */
export async function picture(task) {
  const blob = await (await request("GET", `/api/tasks/${task}/picture`)).blob();
  const [bitmap, hash] = await Promise.all([createImageBitmap(blob), blob.arrayBuffer().then(sha256)]);
  return { bitmap, stamp: hash ?? String(blob.size) };
}

export const proposal = (task, length) => plane(`/api/tasks/${task}/proposal`, length);
export const mine = (task) => json("GET", `/api/tasks/${task}/mine`);
export const truth = (task, length) => plane(`/api/tasks/${task}/truth`, length);
export const assist = (task, x, y, length) => plane(`/api/tasks/${task}/assist`, length, "POST", { json: { x, y } });
export const release = (task, fence, reason) => json("POST", `/api/tasks/${task}/release`, { json: { fence, reason } });

/** The draft on the server, {version, state, planes}, or null. */
export async function draft(task, length) {
  let response;
  try {
    response = await request("GET", `/api/tasks/${task}/draft`);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
  const bytes = new Uint8Array(await response.arrayBuffer());
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  const planes = Object.fromEntries(
    head.planes.map((name, index) => {
      const from = 4 + size + index * length;
      return [name, bytes.subarray(from, from + length)];
    }),
  );
  return { version: head.version, state: head.state ?? {}, planes };
}

export const putDraft = (task, version, fields, planes) =>
  sendPacked(`/api/tasks/${task}/draft`, fields, planes, { "If-Match": String(version) });
export const annotate = (task, fields, planes) => sendPacked(`/api/tasks/${task}/annotation`, fields, planes);

export const reviewNext = () => json("GET", "/api/review/next");
export const annotations = (task) => json("GET", `/api/tasks/${task}/annotations`);
export const annotationPlane = (task, id, name, length) =>
  plane(`/api/tasks/${task}/annotations/${id}/${name}`, length);
export const review = (task, fields, planes) => sendPacked(`/api/tasks/${task}/review`, fields, planes);
