//! Chat templates that would hang, take all memory or overflow the stack end in an error that says so. This is a
//! program of its own, so that the most memory that it ever had can be measured.

use std::fmt::Write;

use fsdp_qlora::testing::ChatTemplate;
use jiff::Zoned;
use serde_json::json;

/// Most memory that a rendering may take: fuel for 320 MB of text, and as much again while a string grows.
const MAX_MEMORY_KIB: u64 = 1_500_000;

fn outcome(source: &str) -> String {
    let messages = [json!({"role": "user", "content": "a"})];
    let rendered = ChatTemplate::new(source, Vec::new(), &Zoned::now()).and_then(|t| t.render(&messages, false));
    match rendered {
        Ok(rendered) => format!("rendered {} bytes", rendered.text.len()),
        Err(error) => format!("{error:#}"),
    }
}

fn repeated(begin: &str, middle: &str, end: &str, n: usize) -> String {
    format!("{}{middle}{}", begin.repeat(n), end.repeat(n))
}

/// A loop in a loop, that runs until the fuel is used up.
fn looped(start: &str, body: &str) -> String {
    format!(
        "{{% set ns = namespace(x={start}) %}}{{% for i in range(9999) %}}{{% for j in range(9999) %}}{body}{{% endfor %}}{{% endfor %}}"
    )
}

#[test]
fn attacks_end_in_an_error_that_names_the_template() {
    let mut attacks = vec![
        ("nested loops", looped("1", "{% for k in range(9999) %}{% endfor %}")),
        ("a long string", "{{ 'a' * 10**10 }}".into()),
        ("a long list", "{% for x in [1] * 10**10 %}a{% endfor %}".into()),
        ("doubling by ~", looped("'aaaaaaaa'", "{% set ns.x = ns.x ~ ns.x %}")),
        ("doubling by +", looped("'aaaaaaaa'", "{% set ns.x = ns.x + ns.x %}")),
        ("doubling by captures", looped("'aaaaaaaa'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}")),
        ("range", "{{ range(10**9) | list }}".into()),
        ("replace", "{{ ('a' * 9999999).replace('', 'b' * 9999999) }}".into()),
        ("the filter replace", "{{ ('a' * 9999999) | replace('', 'b' * 9999999) }}".into()),
        ("join", "{{ ('b' * 999999).join('a' * 9999999) }}".into()),
        ("the filter join", "{{ ('a' * 9999999) | join('b' * 999999) }}".into()),
        ("indent", "{{ 'a\nb' | indent(10**9) }}".into()),
        ("width of %", "{{ '%1000000000d' | format(1) }}".into()),
        ("width of format", "{{ '{:1000000000}'.format(1) }}".into()),
        ("batch", "{{ [1] | batch(10**9, 1) | list }}".into()),
        ("indent of tojson", "{{ (messages * 100000) | tojson(indent=10**9) }}".into()),
        (
            "nested values to JSON",
            looped("1", "{% set ns.x = [ns.x] %}{% if j == 2000 %}{{ ns.x | tojson }}{% endif %}"),
        ),
        ("deep values", looped("1", "{% set ns.x = [ns.x] %}")),
        ("deep maps", looped("1", "{% set ns.x = {'a': ns.x} %}")),
        ("a macro that calls itself", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into()),
        ("a loop that calls itself", "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}".into()),
        ("including itself", "{% include 'chat' %}".into()),
        ("extending itself", "{% extends 'chat' %}".into()),
        ("text that is too long", "a".repeat(300_000)),
    ];
    for (name, begin, middle, end) in [
        ("parentheses", "(", "1", ")"),
        ("lists", "[", "1", "]"),
        ("minus", "-", "1", ""),
        ("not", "not ", "1", ""),
        ("plus", "1+", "1", ""),
        ("tilde", "1~", "1", ""),
        ("power", "1**", "1", ""),
        ("or", "1 or ", "1", ""),
    ] {
        attacks.push((name, format!("{{{{ {} }}}}", repeated(begin, middle, end, 100_000))));
    }
    attacks.push(("nested ifs", repeated("{% if 1 %}", "", "{% endif %}", 100_000)));
    let mut wrong = String::new();
    for (name, source) in attacks {
        let outcome = outcome(&source);
        if !outcome.contains("the chat template") || outcome.len() > 400 || outcome.contains('\n') {
            writeln!(wrong, "{name}: {outcome}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let peak = peak_kib();
    assert!(peak < MAX_MEMORY_KIB, "{peak} KiB");
}

/// minijinja adds up lists when their items are asked for, which no fuel pays for. The thread that does it cannot be
/// stopped and goes on until its process ends, so that another process tries it.
#[test]
fn a_list_that_doubles_ends_before_memory_does() {
    const CHILD: &str = "FSDP_QLORA_TEST_TEMPLATE_CHILD";
    if std::env::var_os(CHILD).is_some() {
        println!("{}", outcome(&looped("[1]", "{% set ns.x = ns.x + ns.x %}")));
        println!("peak {}", peak_kib());
        std::process::exit(0);
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "a_list_that_doubles_ends_before_memory_does", "--nocapture"]).env(CHILD, "1");
    let output = String::from_utf8(child.output().unwrap().stdout).unwrap();
    assert!(output.contains("the chat template takes more than"), "{output}");
    let peak = output.lines().find_map(|line| line.strip_prefix("peak ")?.parse::<u64>().ok());
    assert!(peak.is_some_and(|kib| kib < 6_000_000), "{output}");
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    peak.unwrap()
}

/// The largest chain of operators and the deepest value that are allowed do not overflow the stack.
#[test]
fn what_is_just_allowed_renders() {
    for source in [
        format!("{{{{ 1{} }}}}", "+1".repeat(2_000)),
        "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}".into(),
        format!("{{% for m in messages %}}{}{{% endfor %}}", "x".repeat(250_000)),
    ] {
        assert!(outcome(&source).starts_with("rendered"), "{}", outcome(&source));
    }
}

/// Messages and arguments of tools nested as deep as JSON may be are rendered, and a long conversation is not refused.
#[test]
fn ordinary_conversations_are_far_from_the_limits() {
    let source = "{% for m in messages %}{% if m.calls %}{{ m.calls | tojson(indent=2) }}{% else %}{{ m.role + ': ' + m.content | trim }}{% endif %}{% endfor %}";
    let template = ChatTemplate::new(source, Vec::new(), &Zoned::now()).unwrap();
    let deep: serde_json::Value = serde_json::from_str(&repeated("[", "1", "]", 100)).unwrap();
    let mut messages = vec![json!({"role": "user", "content": "word ".repeat(400)}); 5_000];
    messages.push(json!({"role": "assistant", "calls": deep}));
    assert!(template.render(&messages, false).unwrap().text.len() > 10_000_000);
}
