// SPDX-License-Identifier: GPL-3.0-or-later

// Takes blocks on a free port of UDP, which it writes first; then the hex SHA-256 of each body, one a line.
const coap = require('coap')
const crypto = require('crypto')
const server = coap.createServer({ type: 'udp4' }, (request, response) => {
  console.log(crypto.createHash('sha256').update(request.payload).digest('hex'))
  response.code = '2.01'
  response.end()
})
server.listen(0, '127.0.0.1', () => console.log(server._sock.address().port))
