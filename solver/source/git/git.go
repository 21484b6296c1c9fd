// SPDX-License-Identifier: Apache-2.0

// Package git is the source of trees in git repositories: a build context at a git address, ADD of one. Its pin is a
// commit: the server is asked once a build what a branch or tag is now, and a full commit ID is not asked for at all. Objects are
// kept in a bare repository for each remote, so that the next commit of it fetches what is new. The work is done by
// the git command of this machine, cut off from this machine's git configuration.
package git

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/gitutil"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// Scheme is the scheme of the identifiers, which are git://HOST/PATH[#REF[:SUBDIRECTORY]] whatever the transport.
const Scheme = "git"

// Deps is what the source works with.
type Deps struct {
	Layers *layer.Store
	// Repositories are where it fetches to; nil means those of Dir.
	Repositories *Repositories
	// Dir keeps the bare repositories if Repositories is nil. It is made when it is needed.
	Dir string
}

// New returns the function that makes sources of vertices.
func New(deps Deps) func(*solver.Vertex) (solver.Source, error) {
	repos := deps.Repositories
	if repos == nil {
		repos = NewRepositories(deps.Dir)
	}
	return func(v *solver.Vertex) (solver.Source, error) {
		op := v.Op.GetSource()
		s := &source{layers: deps.Layers, repos: repos}
		if err := s.parse(op); err != nil {
			return nil, fmt.Errorf("source %s: %w", op.GetIdentifier(), err)
		}
		return s, nil
	}
}

type source struct {
	layers *layer.Store
	repos  *Repositories

	remote         string // without credentials unless the client gave some
	ref            string
	subdir         string
	checksum       string // a prefix of the commit's or the tag's ID
	keepGitDir     bool
	skipSubmodules bool
	commitTime     bool // files get the time of the commit, not of the checkout
	authHeader     string
	authToken      string
	sshAgent       string
	knownHosts     string

	mu     sync.Mutex // guards pinned
	pinned pinned
}

// pinned is what the ref stood for when the build asked.
type pinned struct {
	ref    string // full name, "" for a commit ID
	object string // what the ref names: a commit, or an annotated tag
	commit string
}

func (s *source) parse(op *pb.SourceOp) error {
	remote := strings.TrimPrefix(op.GetIdentifier(), Scheme+"://")
	if full := op.Attrs[pb.AttrFullRemoteURL]; full != "" {
		_, fragment, _ := strings.Cut(remote, "#")
		remote = full
		s.ref, s.subdir, _ = strings.Cut(fragment, ":")
	}
	if !gitutil.IsGitTransport(remote) {
		remote = "https://" + remote
	}
	u, err := gitutil.ParseURL(remote)
	if err != nil {
		return fmt.Errorf("not a git address: %w", err)
	}
	s.remote = u.Remote
	if u.Opts != nil && op.Attrs[pb.AttrFullRemoteURL] == "" {
		s.ref, s.subdir = u.Opts.Ref, u.Opts.Subdir
	}
	if strings.HasPrefix(s.ref, "-") || strings.HasPrefix(s.remote, "-") {
		return errors.New("a ref or address that begins with a dash")
	}
	s.subdir = strings.TrimPrefix(path.Join("/", s.subdir), "/")
	for _, key := range slices.Sorted(maps.Keys(op.Attrs)) {
		if err := s.attr(key, op.Attrs[key]); err != nil {
			return fmt.Errorf("attribute %s: %w", key, err)
		}
	}
	return nil
}

func (s *source) attr(key, value string) (err error) {
	switch key {
	case pb.AttrFullRemoteURL:
	case pb.AttrKeepGitDir:
		s.keepGitDir, err = strconv.ParseBool(value)
	case pb.AttrGitSkipSubmodules:
		s.skipSubmodules, err = strconv.ParseBool(value)
	case pb.AttrGitChecksum:
		if value == "" || strings.Trim(value, "0123456789abcdef") != "" {
			return fmt.Errorf("%q is not the beginning of a commit ID", value)
		}
		s.checksum = value
	case pb.AttrGitMTime:
		if value != "checkout" && value != "commit" {
			return fmt.Errorf("%q is neither checkout nor commit", value)
		}
		s.commitTime = value == "commit"
	case pb.AttrAuthHeaderSecret:
		s.authHeader = value
	case pb.AttrAuthTokenSecret:
		s.authToken = value
	case pb.AttrMountSSHSock:
		s.sshAgent = value
	case pb.AttrKnownSSHHosts:
		s.knownHosts = value
	default:
		return fmt.Errorf("not supported yet: %s", value)
	}
	return err
}

// Parts says how the tree of a commit is shown; which commit is in the pin.
func (s *source) Parts() []record.Part {
	p := []record.Part{{Name: "op", Value: "git"}}
	if s.subdir != "" {
		p = append(p, record.Part{Name: "subdirectory", Value: s.subdir})
	}
	if s.skipSubmodules {
		p = append(p, record.Part{Name: "submodules", Value: "skipped"})
	}
	if s.commitTime {
		p = append(p, record.Part{Name: "times", Value: "of the commit"})
	}
	if s.keepGitDir {
		p = append(p, record.Part{Name: ".git of", Value: redact(s.remote)})
	}
	return p
}

// InputDigest is never asked: a source has no inputs.
func (s *source) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return "", fmt.Errorf("%s has no inputs", redact(s.remote))
}

// Pin finds out which commit the ref is now.
func (s *source) Pin(ctx context.Context, env *solver.Env) (solver.Pin, error) {
	p, err := s.resolve(ctx, env)
	if err != nil {
		return solver.Pin{}, fmt.Errorf("git %s: %w", redact(s.remote), err)
	}
	s.mu.Lock()
	s.pinned = p
	s.mu.Unlock()
	parts := []record.Part{{Name: "commit", Value: p.commit}}
	if s.keepGitDir && p.ref != "" {
		parts = append(parts, record.Part{Name: "ref", Value: p.ref + " " + p.object})
	}
	return solver.Pin{Parts: parts, Resolved: p.commit}, nil
}

// DescribePin implements solver.PinDescriber.
func (s *source) DescribePin(ctx context.Context, env *solver.Env) (solver.PinDescription, error) {
	p, err := s.resolve(ctx, env)
	if err != nil {
		return solver.PinDescription{}, fmt.Errorf("git %s: %w", redact(s.remote), err)
	}
	return solver.PinDescription{Ref: p.ref, Object: p.object, Commit: p.commit}, nil
}

func (s *source) resolve(ctx context.Context, env *solver.Env) (pinned, error) {
	if gitutil.IsCommitSHA(s.ref) {
		if !strings.HasPrefix(s.ref, s.checksum) {
			return pinned{}, fmt.Errorf("commit %s does not have the checksum %s", s.ref, s.checksum)
		}
		return pinned{object: s.ref, commit: s.ref}, nil
	}
	git, release, err := s.command(ctx, env)
	if err != nil {
		return pinned{}, err
	}
	defer release()
	patterns := []string{"HEAD"}
	if s.ref != "" {
		patterns = []string{s.ref, s.ref + "^{}"}
	}
	out, err := git.Run(ctx, append([]string{"ls-remote", "--symref", "--", s.remote}, patterns...)...)
	if err != nil {
		return pinned{}, remoteError("ask for "+s.refName(), err)
	}
	p, ok := choose(s.ref, string(out))
	if !ok {
		return pinned{}, fmt.Errorf("the repository has no %s", s.refName())
	}
	if !strings.HasPrefix(p.commit, s.checksum) && !strings.HasPrefix(p.object, s.checksum) {
		return pinned{}, fmt.Errorf("%s is %s, which does not have the checksum %s", s.refName(), p.commit, s.checksum)
	}
	return p, nil
}

func (s *source) refName() string {
	if s.ref == "" {
		return "default branch"
	}
	return "ref " + strconv.Quote(s.ref)
}

// choose picks from the answer of ls-remote what git checkout would: a full name first, then a branch, then a tag. An
// empty ref is the default branch.
func choose(ref, answer string) (pinned, bool) {
	objects := map[string]string{}
	head := "HEAD"
	for line := range strings.Lines(answer) {
		object, name, ok := strings.Cut(strings.TrimSpace(line), "\t")
		if !ok {
			continue
		}
		if target, ok := strings.CutPrefix(object, "ref: "); ok {
			if name == "HEAD" {
				head = target
			}
			continue
		}
		if gitutil.IsCommitSHA(object) {
			objects[name] = object
		}
	}
	if ref == "" {
		object, ok := objects["HEAD"]
		return pinned{ref: head, object: object, commit: object}, ok
	}
	for _, name := range []string{
		"refs/" + strings.TrimPrefix(ref, "refs/"),
		"refs/heads/" + strings.TrimPrefix(ref, "refs/heads/"),
		"refs/tags/" + strings.TrimPrefix(ref, "refs/tags/"),
	} {
		object, ok := objects[name]
		if !ok {
			continue
		}
		p := pinned{ref: name, object: object, commit: object}
		if commit, ok := objects[name+"^{}"]; ok {
			p.commit = commit
		}
		return p, true
	}
	return pinned{}, false
}

// Run checks the commit out into a layer.
func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	s.mu.Lock()
	p := s.pinned
	s.mu.Unlock()
	id, err := s.checkout(ctx, env, p)
	if err != nil {
		return nil, fmt.Errorf("git %s: %w", redact(s.remote), err)
	}
	if id == "" {
		return []snapshot.Snapshot{nil}, nil
	}
	return []snapshot.Snapshot{{id}}, nil
}

// fetched brings the commit into the bare repository, which is the caller's until release.
func (s *source) fetched(ctx context.Context, env *solver.Env, p pinned) (git *gitutil.GitCLI, bare string, release func(), err error) {
	git, end, err := s.command(ctx, env)
	if err != nil {
		return nil, "", nil, err
	}
	bare, unlock, err := s.repos.lock(ctx, s.remote)
	if err != nil {
		end()
		return nil, "", nil, err
	}
	release = func() {
		unlock()
		end()
	}
	_, statErr := os.Stat(bare)
	err = s.fetch(ctx, git, bare, p)
	if err != nil && statErr == nil && ctx.Err() == nil {
		// What a killed fetch leaves (lock files, half of a pack) is not worth mending.
		if err = os.RemoveAll(bare); err == nil {
			err = s.fetch(ctx, git, bare, p)
		}
	}
	if err != nil {
		release()
		return nil, "", nil, err
	}
	return git, bare, release, nil
}

// PinObjects implements solver.PinObjectReader: the objects are fetched, and are there for the checkout.
func (s *source) PinObjects(ctx context.Context, env *solver.Env) (solver.GitObjects, error) {
	p, err := s.resolve(ctx, env)
	if err != nil {
		return solver.GitObjects{}, fmt.Errorf("git %s: %w", redact(s.remote), err)
	}
	git, bare, release, err := s.fetched(ctx, env, p)
	if err != nil {
		return solver.GitObjects{}, fmt.Errorf("git %s: %w", redact(s.remote), err)
	}
	defer release()
	git = git.New(gitutil.WithGitDir(bare))
	read := func(args ...string) []byte {
		if err != nil {
			return nil
		}
		var out []byte
		if out, err = git.Run(ctx, args...); err != nil {
			err = fmt.Errorf("git %s: read object %s: %w", redact(s.remote), p.object, err)
		}
		return out
	}
	var o solver.GitObjects
	// What was asked for by ID may be a tag too.
	o.CommitID = strings.TrimSpace(string(read("rev-parse", "--verify", p.object+"^{commit}")))
	if o.CommitID != p.object {
		o.Tag = read("cat-file", "tag", p.object)
	}
	o.Commit = read("cat-file", "commit", o.CommitID)
	return o, err
}

// checkout fetches the commit and makes a layer of it.
func (s *source) checkout(ctx context.Context, env *solver.Env, p pinned) (layer.ID, error) {
	git, bare, release, err := s.fetched(ctx, env, p)
	if err != nil {
		return "", err
	}
	defer release()
	id, err := s.commit(ctx, git, bare, p)
	if err == nil || ctx.Err() != nil || !damaged(ctx, git, bare) {
		return id, err
	}
	// A power cut may leave files of objects empty, of which git finds out only when it needs them.
	if err := os.RemoveAll(bare); err != nil {
		return "", err
	}
	if err := s.fetch(ctx, git, bare, p); err != nil {
		return "", err
	}
	return s.commit(ctx, git, bare, p)
}

// damaged says that objects of the bare repository are missing or not what they were.
func damaged(ctx context.Context, git *gitutil.GitCLI, bare string) bool {
	_, err := git.New(gitutil.WithGitDir(bare)).Run(ctx, "fsck", "--no-dangling", "--no-progress")
	return err != nil && ctx.Err() == nil
}

// commit checks a commit that has been fetched out into a layer.
func (s *source) commit(ctx context.Context, git *gitutil.GitCLI, bare string, p pinned) (layer.ID, error) {
	dir, err := s.layers.NewUpper(ctx)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	tree := filepath.Join(dir, "checkout")
	if err := s.populate(ctx, git, bare, tree, p); err != nil {
		return "", err
	}
	root, err := below(tree, s.subdir)
	if err != nil {
		return "", err
	}
	var when int64
	if s.commitTime {
		if when, err = s.timeOf(ctx, git, bare, p.commit); err != nil {
			return "", err
		}
	}
	if err := settle(root, when); err != nil {
		return "", err
	}
	return s.layers.CommitTree(ctx, root)
}

// fetch brings the commit into the bare repository.
func (s *source) fetch(ctx context.Context, git *gitutil.GitCLI, bare string, p pinned) error {
	if _, err := os.Stat(filepath.Join(bare, "HEAD")); errors.Is(err, fs.ErrNotExist) {
		if _, err := git.Run(ctx, "-c", "init.defaultBranch=master", "init", "--quiet", "--bare", bare); err != nil {
			return fmt.Errorf("make a repository at %s: %w", bare, err)
		}
	}
	git = git.New(gitutil.WithGitDir(bare))
	if _, err := git.Run(ctx, "cat-file", "-e", p.object+"^{commit}"); err == nil {
		return nil
	}
	// Fetched by ID, so that it is just what was pinned; a server that does not allow that sends its branches and tags.
	_, err := git.Run(ctx, "fetch", "--quiet", "--depth=1", "--no-tags", "--force", "--", s.remote, p.object)
	if err != nil && ctx.Err() == nil {
		_, err = git.Run(ctx, "fetch", "--quiet", "--tags", "--force", "--update-shallow", "--", s.remote, "+refs/heads/*:refs/remotes/origin/*")
	}
	if err != nil {
		return remoteError("fetch "+p.object, err)
	}
	if _, err := git.Run(ctx, "cat-file", "-e", p.object+"^{commit}"); err != nil {
		return fmt.Errorf("the repository has no commit %s", p.object)
	}
	return nil
}

// populate puts the commit's tree into the new directory tree: with its .git when that is wanted or submodules need it.
func (s *source) populate(ctx context.Context, git *gitutil.GitCLI, bare, tree string, p pinned) error {
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	submodules := false
	if !s.skipSubmodules {
		_, err := git.New(gitutil.WithGitDir(bare)).Run(ctx, "cat-file", "-e", p.commit+":.gitmodules")
		submodules = err == nil
	}
	if !s.keepGitDir && !submodules {
		in := git.New(gitutil.WithGitDir(bare), gitutil.WithWorkTree(tree))
		// An index of its own: the bare repository's would remember the files of another checkout.
		index := filepath.Join(filepath.Dir(tree), "index")
		in = in.New(gitutil.WithExec(runWith("GIT_INDEX_FILE=" + index)))
		for _, args := range [][]string{{"read-tree", p.commit}, {"checkout-index", "--all", "--quiet"}} {
			if _, err := in.Run(ctx, args...); err != nil {
				return fmt.Errorf("check out %s: %w", p.commit, err)
			}
		}
		return nil
	}

	in := git.New(gitutil.WithWorkTree(tree), gitutil.WithGitDir(filepath.Join(tree, ".git")))
	steps := [][]string{
		{"-c", "init.defaultBranch=master", "init", "--quiet"},
		{"remote", "add", "origin", redactUser(s.remote)},
		{"fetch", "--quiet", "--depth=1", "--no-tags", "--force", "--", bare, p.object},
	}
	switch name, isBranch := strings.CutPrefix(p.ref, "refs/heads/"); {
	case isBranch:
		steps = append(steps, []string{"checkout", "--quiet", "--force", "-B", name, p.commit})
	default:
		if strings.HasPrefix(p.ref, "refs/tags/") {
			steps = append(steps, []string{"update-ref", p.ref, p.object})
		}
		steps = append(steps, []string{"checkout", "--quiet", "--force", "--detach", p.commit})
	}
	for _, args := range steps {
		if _, err := in.Run(ctx, args...); err != nil {
			return fmt.Errorf("check out %s: %w", p.commit, err)
		}
	}
	if submodules {
		// Submodules name their remotes relative to the superproject's, with its credentials if it has some.
		if _, err := in.Run(ctx, "config", "remote.origin.url", s.remote); err != nil {
			return err
		}
		sub := git.New(gitutil.WithDir(tree))
		if _, err := sub.Run(ctx, "submodule", "update", "--quiet", "--init", "--recursive", "--depth=1"); err != nil {
			return remoteError("fetch the submodules", err)
		}
		if _, err := in.Run(ctx, "config", "remote.origin.url", redactUser(s.remote)); err != nil {
			return err
		}
	}
	if s.keepGitDir {
		// The index has inode numbers and times of the files in this store; without them it says the same and is the same everywhere.
		if _, err := in.Run(ctx, "read-tree", "HEAD"); err != nil {
			return fmt.Errorf("check out %s: %w", p.commit, err)
		}
		if submodules {
			if _, err := git.New(gitutil.WithDir(tree)).Run(ctx, "submodule", "--quiet", "foreach", "--recursive", "git read-tree HEAD"); err != nil {
				return fmt.Errorf("check out %s: %w", p.commit, err)
			}
		}
		return forgetFetches(filepath.Join(tree, ".git"))
	}
	return removeGitDirs(tree)
}

// forgetFetches removes from a .git, and from those of submodules in it, what says when and from where in this store they were fetched.
func forgetFetches(gitDir string) error {
	return filepath.WalkDir(gitDir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() == "refs":
			return fs.SkipDir
		case !d.IsDir() || d.Name() != "objects":
			return nil
		}
		for _, name := range []string{"FETCH_HEAD", "ORIG_HEAD", "logs"} { // they come before "objects": they have been walked
			if err := os.RemoveAll(filepath.Join(filepath.Dir(path), name)); err != nil {
				return err
			}
		}
		return fs.SkipDir
	})
}

// removeGitDirs removes the .git of a tree and of its submodules.
func removeGitDirs(tree string) error {
	return filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Name() != ".git" || path == tree {
			return nil
		}
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
}

// below returns the subdirectory of a checkout, whose links are not followed.
func below(tree, subdir string) (string, error) {
	for _, name := range strings.Split(subdir, "/") {
		tree = filepath.Join(tree, name)
		info, err := os.Lstat(tree)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
			return "", fmt.Errorf("the repository has no directory %s", subdir)
		}
		if err != nil {
			return "", err
		}
	}
	return tree, nil
}

// timeOf returns the time of a commit in nanoseconds since the epoch.
func (s *source) timeOf(ctx context.Context, git *gitutil.GitCLI, bare, commit string) (int64, error) {
	out, err := git.New(gitutil.WithGitDir(bare)).Run(ctx, "show", "--no-patch", "--format=%ct", commit)
	if err != nil {
		return 0, err
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("time of commit %s: %w", commit, err)
	}
	return time.Unix(seconds, 0).UnixNano(), nil
}

// command returns git with the build's credentials, which are in its environment, where no process list shows them.
func (s *source) command(ctx context.Context, env *solver.Env) (git *gitutil.GitCLI, release func(), err error) {
	var releases []func()
	release = func() {
		for _, f := range slices.Backward(releases) {
			f()
		}
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	authorization, err := s.authorization(ctx, env)
	if err != nil {
		return nil, nil, err
	}
	var vars []string
	if authorization != "" {
		vars = append(vars,
			"GIT_CONFIG_COUNT=1",
			"GIT_CONFIG_KEY_0=http."+scope(s.remote)+".extraheader",
			"GIT_CONFIG_VALUE_0=Authorization: "+authorization)
	}
	opts := []gitutil.Option{gitutil.WithExec(runWith(vars...)), gitutil.WithGitAdvice(false)}
	if s.knownHosts != "" {
		file, err := s.repos.temp(knownHostsPrefix)
		if err != nil {
			return nil, nil, err
		}
		releases = append(releases, func() { os.Remove(file.Name()) })
		_, err = file.WriteString(s.knownHosts)
		if err = errors.Join(err, file.Close()); err != nil {
			return nil, nil, err
		}
		opts = append(opts, gitutil.WithSSHKnownHosts(file.Name()))
	}
	if s.sshAgent != "" && env.Session != nil {
		socket, done, err := env.Session.SSHAgent(ctx, s.sshAgent)
		switch {
		case err == nil:
			releases = append(releases, done)
			opts = append(opts, gitutil.WithSSHAuthSock(socket))
		case !errors.Is(err, solver.ErrNotFound):
			return nil, nil, err
		}
	}
	return gitutil.NewGitCLI(opts...), release, nil
}

// authorization returns the value of the Authorization header for the remote, "" when the client has none: the secrets
// for its host come before the general ones, headers before tokens.
func (s *source) authorization(ctx context.Context, env *solver.Env) (string, error) {
	u, err := url.Parse(s.remote)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || env.Session == nil {
		return "", nil
	}
	for _, suffix := range []string{"." + u.Host, ""} {
		for _, secret := range []struct {
			name  string
			token bool
		}{{s.authHeader, false}, {s.authToken, true}} {
			if secret.name == "" {
				continue
			}
			value, err := env.Session.Secret(ctx, secret.name+suffix)
			if errors.Is(err, solver.ErrNotFound) {
				continue
			}
			if err != nil {
				return "", err
			}
			if secret.token {
				return "basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+string(value))), nil
			}
			return strings.TrimSpace(string(value)), nil
		}
	}
	return "", nil
}

// scope is the part of the web that the credentials for a remote are for: its host.
func scope(remote string) string {
	u, err := url.Parse(remote)
	if err != nil {
		return remote
	}
	return u.Scheme + "://" + u.Host + "/"
}

// runWith runs a git command with more variables in its environment. git starts helpers that hold its pipes, so the
// whole process group is killed when ctx ends.
func runWith(vars ...string) func(context.Context, *exec.Cmd) error {
	return func(ctx context.Context, cmd *exec.Cmd) error {
		cmd.Env = append(cmd.Env, vars...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			if errors.Is(err, exec.ErrNotFound) {
				return errors.New("the git command is needed for git sources: install git")
			}
			return err
		}
		stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
		defer stop()
		return cmd.Wait()
	}
}

// remoteError says what git said, in one line.
func remoteError(doing string, err error) error {
	text := err.Error()
	switch {
	case strings.Contains(text, "could not read Username"), strings.Contains(text, "Authentication failed"),
		strings.Contains(text, "terminal prompts disabled"):
		return fmt.Errorf("%s: the server wants credentials: give a token as the secret GIT_AUTH_TOKEN", doing)
	case strings.Contains(text, "Permission denied (publickey"):
		return fmt.Errorf("%s: the server refused the ssh key: forward an agent that has it (--ssh default)", doing)
	}
	return fmt.Errorf("%s: %s", doing, strings.Join(strings.Fields(text), " "))
}

// redact hides the password of an address.
func redact(remote string) string {
	if u, err := url.Parse(remote); err == nil && u.User != nil {
		return u.Redacted()
	}
	return remote
}

// redactUser removes user and password from an address with a scheme.
func redactUser(remote string) string {
	u, err := url.Parse(remote)
	if err != nil || u.User == nil || u.Scheme == "ssh" {
		return remote
	}
	u.User = nil
	return u.String()
}

// lock takes the repository of a remote, until unlock.
func (r *Repositories) lock(ctx context.Context, remote string) (dir string, unlock func(), err error) {
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256([]byte(remote))
	name := hex.EncodeToString(sum[:16])
	lock := r.of(name)
	if err := lock.lock(ctx); err != nil {
		return "", nil, err
	}
	bare := filepath.Join(r.dir, name)
	return bare, func() {
		noteUse(bare, remote)
		lock.unlock()
	}, nil
}
