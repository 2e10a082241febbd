// A js-libp2p node that does what its standard input says, one JSON object a line, and
// answers each with one line. Arguments: one JSON object {security, listen, relay}.
import './polyfill.mjs'
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { tls } from '@libp2p/tls'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const ECHO = '/fabric/interop/echo/1'
const STEP_MS = 10_000
const options = JSON.parse(process.argv[2] ?? '{}')
const encrypters = { noise: noise(), tls: tls() }

const node = await createLibp2p({
  addresses: { listen: options.listen ?? [] },
  transports: [tcp(), circuitRelayTransport()],
  connectionEncrypters: (options.security ?? ['noise']).map(name => encrypters[name]),
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  connectionMonitor: { enabled: false },
  // a relay is used because the test says so, not because one is near
  services: { identify: identify(), ping: ping() }
})

await node.handle(ECHO, async stream => {
  for await (const part of stream) {
    stream.send(part)
  }
  await stream.close()
}, { runOnLimitedConnection: true })

const limit = () => ({ signal: AbortSignal.timeout(STEP_MS) })

// identify runs by itself on each new connection; asked twice at once it refuses
const told = new Map()
node.addEventListener('peer:identify', ({ detail }) => told.set(detail.peerId.toString(), detail))

async function identified (peer) {
  const { signal } = limit()
  while (!told.has(peer)) {
    signal.throwIfAborted()
    await new Promise(resolve => setTimeout(resolve, 10))
  }
  return told.get(peer)
}

async function echo (address, text) {
  const started = performance.now()
  const stream = await node.dialProtocol(
    multiaddr(address), ECHO, { ...limit(), runOnLimitedConnection: true }
  )
  stream.send(new TextEncoder().encode(text))
  await stream.close(limit()) // our direction only
  const parts = []
  for await (const part of stream) {
    parts.push(part.subarray())
  }
  return { text: Buffer.concat(parts).toString(), ms: performance.now() - started }
}

const verbs = {
  async addrs () {
    return { peer: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) }
  },
  async dial ({ address }) {
    const started = performance.now()
    const connection = await node.dial(multiaddr(address), limit())
    return {
      peer: connection.remotePeer.toString(),
      security: connection.encryption,
      muxer: connection.multiplexer,
      limited: connection.limits != null,
      ms: performance.now() - started
    }
  },
  async identify ({ peer }) {
    const detail = await identified(peer)
    return {
      agent: detail.agentVersion,
      protocols: detail.protocols,
      addrs: detail.listenAddrs.map(String),
      observed: String(detail.observedAddr)
    }
  },
  async ping ({ address }) {
    return { ms: await node.services.ping.ping(multiaddr(address), limit()) }
  },
  async echo ({ address, text }) {
    return echo(address, text)
  },
  async reserve ({ relay }) {
    const transports = node.components.transportManager
    await transports.listen([multiaddr(`${relay}/p2p-circuit`)])
    return { addrs: node.getMultiaddrs().map(String) }
  },
  async connections () {
    return {
      connections: node.getConnections().map(c => ({
        peer: c.remotePeer.toString(), security: c.encryption, limited: c.limits != null
      }))
    }
  },
  async hangup ({ peer }) {
    await Promise.all(node.getConnections()
      .filter(c => c.remotePeer.toString() === peer)
      .map(c => c.close(limit())))
    return {}
  }
}

function answer (value) {
  process.stdout.write(JSON.stringify(value) + '\n')
}

answer(await verbs.addrs())
for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line)
  try {
    answer(await verbs[request.verb](request))
  } catch (error) {
    answer({ error: error.name, message: error.message, stack: error.stack })
  }
}
process.exit(0)
