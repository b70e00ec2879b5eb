// Calls of /v1/edits on the page's own server, with the key that this tab has.

const KEY = "ultraedit.key";
const SECONDS = 20;

/** The key, in this tab's session storage and nowhere else; null until one was given. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What a call has failed with. `status` is 0 if no answer came. */
export class CallError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  get refused() {
    return this.status === 401 || this.status === 403;
  }
}

/**
 * Call a route. Paths are relative to /v1/edits/, so that a proxy may serve all of it elsewhere.
 *
 * @param {string} path such as "/health", or "" for /v1/edits itself
 * @param {object|Blob} [body] sent with POST: a file as it is, anything else as JSON
 * @param {{wait?: boolean, file?: boolean}} [how] wait: as long as it takes, for a change;
 *     file: the answer is one
 * @returns {Promise<any>} what the server answered
 * @throws {CallError}
 */
export async function call(path, body, how = {}) {
  const options = { cache: "no-store", credentials: "omit", redirect: "error", headers: headers() };
  if (body !== undefined) {
    const file = body instanceof Blob;
    options.method = "POST";
    options.body = file ? body : JSON.stringify(body);
    options.headers.set("Content-Type", file ? "application/octet-stream" : "application/json");
  }
  if (!how.wait) options.signal = AbortSignal.timeout(SECONDS * 1000);
  try {
    const response = await fetch(new URL(`../edits${path}`, location.href), options);
    if (response.ok && how.file) return await response.blob();
    return await answer(response);
  } catch (error) {
    if (error instanceof CallError) throw error;
    if (error.name === "TimeoutError") throw new CallError(`The server has not answered for ${SECONDS} s.`);
    throw new CallError("The server does not answer.");
  }
}

function headers() {
  const given = key.get();
  if (!given) return new Headers();
  try {
    return new Headers({ Authorization: `Bearer ${given}` });
  } catch {
    throw new CallError("The key has characters that no key can have.", 401);
  }
}

async function answer(response) {
  const text = await response.text();
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new CallError(`The server answered ${response.status} and no JSON; is something else in between?`, response.status);
  }
  // Health that is not well is an answer too.
  if (response.ok || Array.isArray(data.ranks)) return data;
  const message = data.error?.message ?? `The server answered ${response.status}.`;
  const seconds = Number(response.headers.get("Retry-After"));
  throw new CallError(message, response.status, seconds || null);
}

/** A new idempotency key. `crypto.randomUUID` is not there on a plain http origin. */
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
