// The whole state of the page is in its address: #/page?name=value. Every state has a link, and Back works.

export function read() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { page: path || "", params: new URLSearchParams(query || "") };
}

export function link(page, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "") query.append(name, each);
    }
  }
  const text = query.toString();
  return `#/${page}${text ? `?${text}` : ""}`;
}

// Change some parameters of the address; a null or empty one goes. Without `push` the step is not in the history.
export function change(changes, { push = false } = {}) {
  const { page, params } = read();
  for (const [name, value] of Object.entries(changes)) {
    params.delete(name);
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "" && each !== false) params.append(name, each === true ? "1" : each);
    }
  }
  const text = params.toString();
  const address = `#/${page}${text ? `?${text}` : ""}`;
  if (push) location.hash = address;
  else history.replaceState(null, "", address);
}
