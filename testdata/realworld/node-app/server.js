// SPDX-License-Identifier: Apache-2.0
// Prints or serves a page made from a template.
const http = require('http')
const mustache = require('mustache')

const page = () => mustache.render('Next high water: {{when}}\n', { when: 'soon' })

if (process.argv.includes('--print')) {
  process.stdout.write(page())
} else {
  http.createServer((_, response) => response.end(page())).listen(3000)
}
