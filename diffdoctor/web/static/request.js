// Requests of a page. Tokens come in the address's fragment, which browsers do not send, and stay in this tab.

const TOKEN = "diffdoctor-token";
const TIMEOUT_MS = 30000;

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error || `The server answered ${status}.`);
    Object.assign(this, { status, body });
  }
}

/** No answer came: no network, or no server. Worth trying again. */
export class Offline extends Error {}

export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(TOKEN, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(TOKEN);
}

export function useToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

const RETRY_MS = [1000, 2000, 4000, 8000, 15000];

/** Milliseconds to wait where so many attempts have had no answer. */
export const retryAfter = (attempts) => RETRY_MS[Math.min(attempts, RETRY_MS.length - 1)];

export async function request(method, path, { json, body, headers = {} } = {}) {
  const sent = { Authorization: `Bearer ${sessionStorage.getItem(TOKEN) ?? ""}`, ...headers };
  if (json !== undefined) {
    sent["Content-Type"] = "application/json";
    body = JSON.stringify(json);
  }
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: sent,
      body,
      cache: "no-store",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch (error) {
    throw new Offline(String(error));
  }
  if (response.status >= 502 && response.status <= 504) throw new Offline(`The server answered ${response.status}.`);
  if (!response.ok) throw new ApiError(response.status, await response.json().catch(() => null));
  return response;
}

export const json = async (...args) => (await request(...args)).json();
