// Reads objects as a JSON list, and prints what is wrong with each as a list of texts: what its model says, and
// every field of its spec that the model does not know. The models check values and let unknown names pass, as
// clusters do, which drop them in silence: a field with a typing error would do nothing.
import { readFileSync } from "node:fs";

const PACKAGES = {
  "cert-manager.io": "cert-manager",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};

// A model is compiled code that reads each field that it knows, if only for its type. So the fields that nobody
// read are unknown.
function watched(value, path, read) {
  if (value === null || typeof value !== "object") return value;
  return new Proxy(value, {
    get(target, key) {
      const found = Reflect.get(target, key);
      if (typeof key === "symbol" || !Object.hasOwn(target, key)) return found;
      read.add(`${path}/${key}`);
      return watched(found, `${path}/${key}`, read);
    },
  });
}

function* paths(value, path) {
  if (value === null || typeof value !== "object") return;
  for (const [key, inner] of Object.entries(value)) {
    yield `${path}/${key}`;
    yield* paths(inner, `${path}/${key}`);
  }
}

async function problems(object) {
  const name = PACKAGES[object.apiVersion.split("/")[0]];
  if (name === undefined) return [`there is no model of ${object.apiVersion}`];
  const models = await import(`@kubernetes-models/${name}/${object.apiVersion}`);
  const model = new models[object.kind](object);
  const read = new Set();
  const found = [];
  model.spec = watched(model.spec, "/spec", read);
  try {
    model.validate();
  } catch (error) {
    found.push(error.message);
  }
  for (const path of paths(object.spec, "/spec")) {
    if (!read.has(path)) found.push(`unknown: ${path}`);
  }
  return found;
}

const objects = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(await Promise.all(objects.map(problems))));
