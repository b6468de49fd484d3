// SPDX-License-Identifier: GPL-3.0-or-later

// Puts random blocks of 32 KiB, some at a time: put.js HOST PORT COUNT AT_A_TIME. It writes the blocks' hex SHA-256 that were
// answered by 2.01, one a line.
const coap = require('coap')
const crypto = require('crypto')
const [host, port, count, atATime] = process.argv.slice(2)
// An agent has one socket, which it closes when it has nothing under way.
const agent = atATime === '1' ? false : new coap.Agent({ type: 'udp4' })
let begun = 0
let over = 0
let again = 0

function next () {
  if (begun >= Number(count)) return
  begun++
  put(crypto.randomBytes(32768))
}

function put (block) {
  const request = coap.request({ host, port: Number(port), method: 'PUT', pathname: '/.well-known/eris/blocks', agent })
  request.setOption('Block1', Buffer.from([0x06]))
  request.on('response', (response) => {
    // A second copy of the answer to a part, as for a machine that is busy, passes for the last answer.
    if (response.code === '2.31' && again++ < Number(count)) return put(block)
    if (response.code === '2.01') console.log(crypto.createHash('sha256').update(block).digest('hex'))
    else console.error(response.code)
    end()
  })
  request.on('error', (err) => { console.error(err.message); end() })
  request.end(block)
}

function end () {
  over++
  next()
  if (over === Number(count)) process.exit(0)
}

for (let i = 0; i < Number(atATime); i++) next()
