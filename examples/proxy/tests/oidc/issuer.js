// A real OpenID Connect issuer, on a free port. Its clients are the users: each gets JWTs for the audience `my-app`, whose `sub` is
// the client's id. Prints its URL; each line on standard input rotates the key, and is answered with a line.
import { generateKeyPairSync, randomUUID } from "node:crypto";
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { Provider } from "oidc-provider";

const [, , secret, ...users] = process.argv;
const keys = [];
let handle;

// The new key signs, and the previous one is still published.
function rotate(issuer) {
  const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  keys.unshift({ ...privateKey.export({ format: "jwk" }), kid: randomUUID(), use: "sig", alg: "ES256" });
  const provider = new Provider(issuer, {
    jwks: { keys: keys.slice(0, 2) },
    clients: users.map((user) => ({
      client_id: user,
      client_secret: secret,
      grant_types: ["client_credentials"],
      redirect_uris: [],
      response_types: [],
      id_token_signed_response_alg: "ES256",
    })),
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => "urn:my-app",
        getResourceServerInfo: () => ({
          audience: "my-app",
          scope: "",
          accessTokenFormat: "jwt",
          jwt: { sign: { alg: "ES256" } },
        }),
      },
    },
    ttl: { ClientCredentials: 600 },
  });
  handle = provider.callback();
}

const server = createServer((request, response) => handle(request, response));
server.listen(0, "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  rotate(issuer);
  console.log(issuer);
  const lines = createInterface({ input: process.stdin });
  lines.on("line", () => {
    rotate(issuer);
    console.log("rotated");
  });
  // The test has ended.
  lines.on("close", () => process.exit());
});
